"""Extraction of a LoRA from a fine-tuned model."""

from __future__ import annotations

import math
from typing import Any

import torch

import veneer
from tests.adapter_merging.cases import change, lost, pipeline, put
from tests.injection.toy import ToyHost, net
from tests.raising import raises
from veneer.adapter_merging import CombineError, RankSelection, extract
from veneer.injection import StateError, attach
from veneer.testing.pipelines import tiny_pipeline


def tuned_of(**config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A pipeline with a LoRA of rank 3 merged by hand, and its ΔW."""
    pipe = pipeline()
    lora = put(pipe, "lora", 1, ("attn", "conv.io", "text/attn.q"), rank=3, **config)
    changes = {n: change(lora, n) for n in lora.parts}
    places = {n: (site.component, site.path) for n, (site, _) in lora.parts.items()}  # type: ignore[attr-defined]
    lora.detach()
    with torch.no_grad():
        for name, (component, path) in places.items():
            weight = getattr(pipe, component).get_parameter(f"{path}.weight")
            weight.add_(changes[name].reshape(weight.shape).to(weight.dtype))
    return pipe, changes


def test_extract_recovers_a_merged_lora() -> None:
    """Exact at the true rank, up to the float32 rounding of W."""
    (tuned, changes), base = tuned_of(), pipeline()
    result = extract(base, tuned, 3)
    assert veneer.attachments(base) == [result.attachment]
    assert result.attachment.parts.keys() == changes.keys()
    assert all(lost(changes[n], change(result.attachment, n)) < 1e-5 for n in changes)
    assert result.error < 1e-5
    assert result.notes == ()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 4, 24))
    with torch.no_grad():
        torch.testing.assert_close(base.unet(*inputs).sample, tuned.unet(*inputs).sample, rtol=1e-4, atol=1e-4)


def test_extract_selects_ranks_by_error() -> None:
    (tuned, changes), base = tuned_of(), pipeline()
    result = extract(base, tuned, RankSelection(error=0.3))
    for m in result.factors:
        s = torch.linalg.svdvals(changes[m.site.name])
        rest = [math.sqrt(float(s[k:].pow(2).sum() / s.pow(2).sum())) for k in range(1, 4)]
        assert m.rank == 1 + next(k for k, error in enumerate(rest) if error <= 0.3)
        assert m.error <= 0.3
    assert len({m.rank for m in result.factors}) > 1


def test_extract_with_where_notes_other_differences() -> None:
    (tuned, _), base = tuned_of(), pipeline()
    with torch.no_grad():
        tuned.unet.conv_in.bias.add_(1.0)
    result = extract(base, tuned, 3, where="attn.q")
    assert {m.site.role for m in result.factors} == {"attn.q"}
    assert {m.site.component for m in result.factors} == {"unet"}
    (note,) = result.notes
    assert note.startswith("not included: ")
    assert "unet.conv_in.bias" in note


def test_extract_slices_of_a_fused_weight() -> None:
    """q and v of the fused weight differ, k does not."""
    veneer.hosts.register(ToyHost)
    try:
        base, tuned = net(), net()
        with torch.no_grad():
            tuned.qkv.weight[:6] += torch.eye(6)
            tuned.qkv.weight[12:] -= torch.outer(torch.arange(6.0), torch.ones(6))
        result = extract(base, tuned, RankSelection(error=1e-3))
        assert {m.site.name: m.rank for m in result.factors} == {"qkv.q": 6, "qkv.v": 1}
        torch.testing.assert_close(change(result.attachment, "qkv.q").float(), torch.eye(6), rtol=0, atol=1e-6)
        assert result.notes == ()
        (note,) = extract(net(), tuned, 3, where="attn.q").notes
        assert note.startswith("not included: 1 other tensors differ (relative to their norm: qkv.weight by ")
    finally:
        veneer.hosts.unregister("toy")


def test_extract_errors() -> None:
    (tuned, _), base = tuned_of(), pipeline()
    with raises(CombineError, given=0, expected=1):
        extract(base, pipeline(), 3)
    with raises(CombineError, where="unet") as caught:
        extract(base, tiny_pipeline("sd", block_out_channels=(20, 32)), 3)
    given, expected = (shapes["conv_in.weight"] for shapes in (caught.value.given, caught.value.expected))
    assert (given[0], expected[0]) == (20, 16)
    lora = attach(tuned, "lora")
    lora.merge()
    with raises(StateError, where="lora", given="merged"):
        extract(base, tuned, 3)
    assert veneer.attachments(base) == []

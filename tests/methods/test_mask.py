"""Masking: W ∘ 1[S > τ] with a straight-through gradient, against dense masks on a bare model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch

import veneer
from tests.methods.selections import MODELS, at_sites, explicit, plain_gradients, tiny
from tests.raising import raises
from veneer.functional.packed_bits import pack_bits, unpack_bits
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.selective.entries.mask import Mask
from veneer.testing.case import loss


@pytest.mark.parametrize(("host", "name"), [MODELS[0], MODELS[2]])
def test_outputs_and_straight_through_gradients(host: str, name: str) -> None:
    model, samples = tiny(host, name)
    bare = copy.deepcopy(model)
    tuned = attach(model, "mask", threshold=0.5)
    weights = [w.detach() for w in at_sites(tuned, dict(bare.named_parameters()))]
    deltas = []
    for (_, adapter), w in zip(tuned.parts.values(), weights, strict=True):
        torch.nn.init.normal_(adapter.scores)
        deltas.append(torch.where(adapter.scores > 0.5, 0.0, -w).detach())
    changed = explicit(bare, tuned, deltas)
    got = loss(model, samples[0])
    torch.testing.assert_close(got, loss(changed, samples[0]), rtol=1e-5, atol=1e-6)
    got.backward()
    (of_sample,) = plain_gradients(changed, samples[:1])
    for (_, adapter), w, gradient in zip(tuned.parts.values(), weights, at_sites(tuned, of_sample), strict=True):
        found = torch.zeros_like(w) if adapter.scores.grad is None else adapter.scores.grad
        torch.testing.assert_close(found, w * gradient, rtol=1e-5, atol=1e-8)


def test_the_initial_mask_has_so_many_zeros() -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "mask", initial_sparsity=0.3)
    scores = torch.cat([adapter.scores.detach().flatten() for _, adapter in tuned.parts.values()])
    assert float((scores <= 0.01).double().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(scores.min()) == pytest.approx(0.01 - 0.3 * 0.02, abs=1e-4)
    assert float(scores.max()) == pytest.approx(0.01 + 0.7 * 0.02, abs=1e-4)
    zeros = int((scores <= 0.01).sum())
    assert tuned.report().summary == f"{zeros:,} of {len(scores):,} entries masked"
    tuned.detach()
    bare = loss(model.requires_grad_(False), samples[0])
    attach(model, "mask", initial_sparsity=0)
    assert torch.equal(loss(model, samples[0]).detach(), bare)


def test_bits_are_those_of_the_mask() -> None:
    kept = torch.tensor([True, False, False, True, True, False, True, False, True, True])
    assert pack_bits(kept).tolist() == [0b01011001, 0b11]
    assert torch.equal(unpack_bits(pack_bits(kept), 10), kept)


def test_a_file_has_bits_only(tmp_path: Path) -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "mask")
    for p in tuned.parameters():
        torch.nn.init.normal_(p)
    count = sum(p.numel() for p in tuned.parameters())
    assert {key.rpartition(":")[2] for key in tuned.state_dict()} == {"bits"}
    path = tuned.save(tmp_path / "mask")
    assert path.stat().st_size < count / 8 + 12_000
    other, _ = tiny("timm_vit", "vit")
    veneer.load(other, path)
    assert torch.equal(loss(other, samples[0]), loss(model, samples[0]))


def test_other_tensors_leave_the_scores_as_they_are() -> None:
    """Scores are set from bits only where a file has bits."""
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, "mask", train=("head",))
    before = [adapter.scores.detach().clone() for _, adapter in tuned.parts.values()]
    head = {key: torch.zeros_like(t) for key, t in tuned.state_dict().items() if key.startswith("head:")}
    assert len(tuned.load_state_dict(head, strict=False).used) == 2
    assert all(torch.equal(a.scores, scores) for (_, a), scores in zip(tuned.parts.values(), before, strict=True))


def test_counts() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    report = attach(vit, "mask").report()
    assert report.trainable == 84_934_656
    assert report.stored == 10_616_832


@pytest.mark.parametrize(("option", "given"), [("threshold", 0.0), ("initial_sparsity", -0.1), ("initial_sparsity", 1.1)])
def test_bad_options(option: str, given: float) -> None:
    with raises(OptionError, method="mask", option=option, given=given):
        Mask(**{option: given})

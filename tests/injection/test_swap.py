"""`Attachment.swap`: the same function as a load of the file, without a new graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.injection.toy import net, run, stir
from tests.raising import raises
from veneer import load
from veneer.formats import formats
from veneer.injection import Attachment, LoadError, StateError, attach, hosts
from veneer.injection.method import Method
from veneer.methods.reparameterized.kronecker.loha import LoHa
from veneer.methods.reparameterized.kronecker.lokr import LoKr
from veneer.methods.reparameterized.low_rank.dora import DoRA
from veneer.methods.reparameterized.low_rank.lora import LoRA
from veneer.methods.reparameterized.rotation.oft import OFT
from veneer.testing.pipelines import tiny_pipeline
from veneer.testing.snapshot import assert_same, snapshot

ALL = "embed.token conv attn.{q,k,out} head"
WEIGHTS = "conv attn.{q,k,out} head"


def save_adapter(path: Path, method: Method, where: str, train: str = "") -> Path:
    """A trained adapter's file."""
    torch.manual_seed(3)
    tuned = attach(net(), method, where=where, train=train.split())
    stir(tuned)
    with torch.no_grad():
        for _, adapter in tuned.parts.values():
            for name in ("down0", "up0"):
                if hasattr(adapter, name):
                    getattr(adapter, name).mul_(0.5)
    return tuned.save(path / "file")


def delta_weights(model: nn.Module, tuned: Attachment) -> dict[str, Tensor]:
    """ΔW of every site whose adapter changes the weight, from the weight forms."""
    deltas = {}
    with torch.no_grad():
        for name, (site, adapter) in tuned.parts.items():
            weight = torch.randn(site.weight_shape, generator=torch.Generator().manual_seed(7))
            delta = adapter.weight(weight) - weight
            if delta.any():
                deltas[name] = delta
    return deltas


BY_SITE = {"name:qkv.q": {"rank": 4}, "head": {"rank": 8}, "conv": {"alpha": 5.0}}
SWAPS = [
    (LoRA(rank=8), LoRA(rank=4, alpha=3.0), ALL),
    (LoRA(rank=8, alpha=2.0), LoRA(rank=2, rslora=True, by_site=BY_SITE), ALL),
    (LoRA(rank=8, dropout=0.5), LoRA(rank=4, tucker=True), ALL),
    (LoRA(rank=8), LoRA(rank=2, init="olora"), WEIGHTS),
    (LoRA(rank=8, tucker=True), LoRA(rank=2, alpha=6.0, tucker=True), ALL),
    (LoRA(rank=2, init="olora"), LoRA(rank=2, alpha=1.0), WEIGHTS),
    (DoRA(rank=8, alpha=2.0), DoRA(rank=4, alpha=3.0), "conv attn.{q,k} head"),
    (LoHa(rank=4), LoHa(rank=2, alpha=3.0), WEIGHTS),
    (LoHa(rank=4, tucker=True), LoHa(rank=2, alpha=3.0, tucker=True), WEIGHTS),
    (LoKr(factor=2), LoKr(factor=2, rank=1, alpha=3.0, low="both"), WEIGHTS),
    (LoKr(factor=2, rank=3, alpha=2.0, low="right"), LoKr(factor=2, rank=2, low="right"), WEIGHTS),
    (LoKr(factor=2, rank=3, alpha=2.0, low="both"), LoKr(factor=2, rank=1, alpha=3.0, low="both"), WEIGHTS),
    (DoRA(rank=8, alpha=2.0, norm_axis="input"), DoRA(rank=4, alpha=3.0, norm_axis="input"), "conv attn.{q,k} head"),
    (LoHa(rank=4, norm_axis="output"), LoHa(rank=2, alpha=3.0, norm_axis="output"), WEIGHTS),
    (LoKr(factor=2, norm_axis="input"), LoKr(factor=2, rank=1, alpha=3.0, low="both", norm_axis="input"), WEIGHTS),
    (OFT(blocks=1), OFT(block_size=3), WEIGHTS),
    (OFT(blocks=1, neumann_terms=5), OFT(block_size=3, neumann_terms=5), WEIGHTS),
    (OFT(blocks=1, rescale=True), OFT(block_size=3, share=True, coft=0.01), WEIGHTS),
    (OFT(block_size=3, share=True), OFT(block_size=3, share=True, coft=0.01), WEIGHTS),
    (OFT(block_size=3, rescale=True, side="output"), OFT(block_size=3, rescale=True, side="output"), "conv attn.{q,k,out}"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "smaller", "where"), SWAPS)
def test_a_swap_equals_a_load(method: Method, smaller: Method, where: str, tmp_path: Path) -> None:
    path = save_adapter(tmp_path, smaller, where)
    model, reference = net(), net()
    tuned, loaded = attach(model, method, where=where, name="target"), load(reference, path)
    stir(tuned)  # values before the swap
    shapes = {key: tensor.shape for key, tensor in tuned.state_dict().items()}
    tuned.swap(path)
    expected = delta_weights(reference, loaded)
    actual = delta_weights(model, tuned)
    assert set(actual) == set(expected) == set(tuned.parts)
    for name, delta in expected.items():
        torch.testing.assert_close(actual[name], delta, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(run(model), run(reference), rtol=1e-5, atol=1e-5)
    assert {key: tensor.shape for key, tensor in tuned.state_dict().items()} == shapes
    again = net()
    load(again, tuned.save(tmp_path / "target"))  # the config of the attachment is that of the swapped state
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize("method", [LoRA(rank=4), DoRA(rank=4), LoHa(rank=4), LoKr(factor=2), OFT(blocks=1, rescale=True)])
def test_sites_that_the_file_lacks_are_set_to_no_change(method: Method, tmp_path: Path) -> None:
    path = save_adapter(tmp_path, method, "attn.q")
    model, reference = net(), net()
    tuned = attach(model, method, where="attn.q head")
    stir(tuned)
    tuned.swap(path)
    load(reference, path)
    assert list(delta_weights(model, tuned)) == ["qkv.q"]
    torch.testing.assert_close(run(model), run(reference))


REFUSED = [
    (LoRA(rank=4), LoRA(rank=8), ALL, ALL, {"where": "table", "option": "rank", "given": 4, "expected": 8}),
    (
        LoRA(rank=3),
        LoRA(rank=2, init="olora"),
        "attn.q",
        "attn.q",
        {"where": "qkv.q", "option": "rank", "given": 3, "expected": 4},
    ),
    (LoRA(rank=4, tucker=True), LoRA(rank=4), "conv", "conv", {"option": "tucker", "given": True, "expected": False}),
    (LoRA(rank=4), LoRA(rank=4), "attn.q", "attn.q head", {"where": "target", "option": "where", "given": ("head",)}),
    (LoRA(rank=4), OFT(blocks=2), "attn.q", "attn.q", {"where": "target", "given": "oft", "expected": "lora"}),
    (LoHa(rank=2), LoHa(rank=4), "attn.q", "attn.q", {"option": "rank", "given": 2, "expected": 4}),
    (LoHa(rank=2, tucker=True), LoHa(rank=2), "conv", "conv", {"option": "tucker", "given": True, "expected": False}),
    (
        LoKr(factor=2),
        LoKr(sides=(3, 1)),
        "attn.q",
        "attn.q",
        {"option": "factor", "given": (2, 3, 2, 3), "expected": (3, 2, 1, 6)},
    ),
    (
        LoKr(factor=2, rank=1, low="right"),
        LoKr(factor=2),
        "attn.q",
        "attn.q",
        {"option": "rank", "given": "right", "expected": None},
    ),
    (OFT(block_size=2), OFT(block_size=3), "attn.q", "attn.q", {"option": "block_size", "given": 2, "expected": 3}),
    (
        OFT(block_size=6),
        OFT(block_size=3, rescale=True),
        "attn.q",
        "attn.q",
        {"option": "rescale", "given": False, "expected": True},
    ),
    (OFT(block_size=6, coft=1e-6), OFT(block_size=6), "attn.q", "attn.q", {"option": "coft", "expected": None}),
    (
        OFT(block_size=3),
        OFT(block_size=3, neumann_terms=5),
        "attn.q",
        "attn.q",
        {"option": "neumann_terms", "given": None, "expected": 5},
    ),
    (
        DoRA(rank=2),
        DoRA(rank=2, norm_axis="input"),
        "attn.q",
        "attn.q",
        {"option": "norm_axis", "given": "output", "expected": "input"},
    ),
    (
        LoHa(rank=2),
        LoHa(rank=2, norm_axis="input"),
        "attn.q",
        "attn.q",
        {"option": "norm_axis", "given": None, "expected": "input"},
    ),
    (
        LoKr(norm_axis="output"),
        LoKr(norm_axis="input"),
        "attn.q",
        "attn.q",
        {"option": "norm_axis", "given": "output", "expected": "input"},
    ),
    (OFT(block_size=3), OFT(block_size=3, side="output"), "attn.q", "attn.q", {"option": "side"}),
]


@pytest.mark.parametrize(("method", "other", "where", "file_where", "data"), REFUSED)
def test_an_incompatible_file_is_rejected_and_changes_nothing(
    method: Method, other: Method, where: str, file_where: str, data: dict[str, Any], tmp_path: Path
) -> None:
    path = save_adapter(tmp_path, other, file_where)
    model = net()
    tuned = attach(model, method, where=where, name="target")
    stir(tuned)
    before, output = snapshot(model), run(model)
    with raises(LoadError, file=str(path), **data):
        tuned.swap(path)
    assert torch.equal(run(model), output)
    assert_same(before, snapshot(model), "a rejected swap")


@pytest.mark.parametrize("method", ["vera", "glora"])
def test_other_methods_accept_files_with_the_same_options(method: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    tuned = attach(net(), method, rank=2, where="attn.q head")
    stir(tuned)
    path = tuned.save(tmp_path / "file")
    model, reference = net(), net()
    target = attach(model, method, rank=2, where="attn.q head")
    load(reference, path)
    target.swap(path)
    assert torch.equal(run(model), run(reference))
    with raises(LoadError, where=method, option="rank", given={"rank": 2}, expected={"rank": 3}):
        attach(net(), method, where="attn.q head", rank=3).swap(path)
    with raises(LoadError, where=method, option="where", missing=("qkv.k",)):
        attach(net(), method, rank=2, where="attn.{q,k} head").swap(path)


def test_a_trained_head_is_swapped_or_reported(tmp_path: Path) -> None:
    path = save_adapter(tmp_path, LoRA(rank=2), "attn.q", train="head")
    model, reference = net(), net()
    tuned = attach(model, LoRA(rank=4), where="attn.q", train="head")
    tuned.swap(path)
    load(reference, path)
    torch.testing.assert_close(run(model), run(reference))
    with pytest.raises(LoadError) as caught:
        attach(net(), LoRA(rank=4), where="attn.q").swap(path)
    assert set(caught.value.unused) == {"head:weight", "head:bias"}
    bare = save_adapter(tmp_path, LoRA(rank=2), "attn.q")
    with pytest.raises(LoadError) as caught:
        tuned.swap(bare)
    assert set(caught.value.missing) == {"head:weight", "head:bias"}


def test_scale_report_and_invalid_states(tmp_path: Path) -> None:
    path = save_adapter(tmp_path, LoRA(rank=2), "attn.q")
    tuned = attach(net(), LoRA(rank=4), where="attn.q")
    tuned.scale = 0.5
    tuned.swap(path)
    assert tuned.scale == 0.5
    assert tuned.loaded is not None
    assert set(tuned.loaded.used) == {"qkv.q:down", "qkv.q:up"}
    tuned.merge()
    with raises(StateError, where="lora", given="merged"):
        tuned.swap(path)
    tuned.unmerge()
    tuned.detach()
    with raises(StateError, where="lora", given="detached"):
        tuned.swap(path)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_files_of_other_tools(format: str, tmp_path: Path) -> None:
    """A file of a whole pipeline, swapped into an attachment on all towers; one on the UNet alone rejects it."""
    towers = ("attn", "xattn", "text/attn")
    tuned = attach(tiny_pipeline("sd"), "lora", rank=2, alpha=5.0, where=towers)
    stir(tuned)
    path = formats.get(format)().save(tuned, tmp_path / "file.safetensors")
    pipe, reference = tiny_pipeline("sd"), tiny_pipeline("sd")
    target = attach(pipe, "lora", rank=8, where=towers)
    target.swap(path)
    loaded = load(reference, path)
    for name, delta in delta_weights(reference.unet, loaded).items():
        torch.testing.assert_close(delta_weights(pipe.unet, target)[name], delta, rtol=2e-6, atol=2e-6)
    with raises(LoadError, where="lora", given=("unet",)) as caught:
        attach(tiny_pipeline("sd"), "lora", rank=8).swap(path)
    assert caught.value.unused


def test_a_file_with_several_is_refused(tmp_path: Path) -> None:
    model = net()
    both = [attach(model, LoRA(rank=2), where="attn.q", name=name) for name in ("one", "two")]
    path = formats.get("native")().save(both, tmp_path / "file")
    with raises(LoadError, where="target", given=("lora", "lora"), expected=1):
        attach(net(), LoRA(rank=2), where="attn.q", name="target").swap(path)


@pytest.mark.parametrize(("method", "smaller", "component"), [
    (LoRA(rank=8, alpha=4.0), LoRA(rank=2, alpha=3.0), "unet"),
    (LoKr(factor=2), LoKr(factor=2, rank=1, alpha=3.0, low="right"), "text_encoder"),
    (OFT(blocks=1), OFT(blocks=2), "text_encoder"),
])  # fmt: skip
def test_a_compiled_tower_is_not_compiled_again(method: Method, smaller: Method, component: str, tmp_path: Path) -> None:
    where = "attn" if component == "text_encoder" else ("unet.mid/attn", "unet.mid/xattn")
    source = tiny_pipeline("sd").components[component]
    torch.manual_seed(5)
    trained = attach(source, smaller, where=where)
    stir(trained, 0.2)
    path = trained.save(tmp_path / "file")
    tower, reference = (tiny_pipeline("sd").components[component] for _ in range(2))
    tuned = attach(tower, method, where=where)
    stir(tuned, 0.2)
    (host,) = [h for h in (hosts.get(n)() for n in hosts.names()) if h.matches(tower)]
    inputs = host.sample(tower)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(tower, fullgraph=True, backend=backend)
    before = first(compiled, inputs)
    tuned.swap(path)
    after = first(compiled, inputs)
    load(reference, path)
    torch.testing.assert_close(after, first(reference, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)
    assert len(graphs) == 1
    torch._dynamo.reset()


def first(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]

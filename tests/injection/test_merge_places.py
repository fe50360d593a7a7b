"""Merging into weights that are tied, viewed, computed, cast, offloaded or on meta, and failures during a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.injection.toy import Net, net, run, stir
from tests.raising import raises
from veneer.injection import Adapter, Method, Need, UnsupportedSite, attach
from veneer.injection.sites import WeightSite

WHERE = "conv attn.{q,v,out} head"


def attach_lora(model: Net, where: str = WHERE) -> Any:
    tuned = attach(model, "lora", where=where, rank=2)
    stir(tuned)
    return tuned


def assert_merge_rejected(model: Net, tuned: Any, site: str, obstacle: str) -> None:
    """Asserts that the merge raises an error and that weights, adapters and outputs do not change."""
    before, state = run(model), {k: v.clone() for k, v in tuned.host_state_dict().items()}
    with raises(UnsupportedSite, site=site, given=obstacle):
        tuned.merge()
    assert not tuned.merged
    assert all(torch.equal(v, state[k]) for k, v in tuned.host_state_dict().items())
    assert torch.equal(run(model), before)


def test_parameters_stay_the_same_objects() -> None:
    model = net()
    model.head.weight.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    tuned = attach_lora(model)
    frozen = {name: p.requires_grad for name, p in model.named_parameters() if not name.split(".")[-1].startswith(("up", "down"))}
    tuned.merge()
    assert {name: id(p) for name, p in model.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(frozen.values())
    tuned.unmerge()
    tuned.detach()
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("where", ["head", "attn.out"])
def test_a_tied_weight_is_merged_in_the_adapted_module_only(where: str) -> None:
    """`spare` has the same parameter and keeps the base weight."""
    model = net()
    site = model.get_submodule({"head": "head", "attn.out": "read"}[where])
    site.weight = nn.Parameter(model.tail[0].weight[: len(site.weight)].detach().clone())
    twin = model.spare
    twin.weight = site.weight
    tied, base = twin.weight, twin.weight.detach().clone()
    tuned = attach_lora(model, where)
    unmerged = run(model)
    tuned.merge()
    torch.testing.assert_close(run(model), unmerged, rtol=0, atol=1e-5)
    assert torch.equal(twin.weight, base)
    assert not torch.equal(site.weight, base)
    model.double()
    tuned.unmerge()
    tuned.detach()
    assert site.weight is twin.weight is tied
    assert torch.equal(tied, base.double())


def test_a_view_of_the_weight_keeps_the_base() -> None:
    """As with an unmerged adapter, which changes the output of its module only."""
    model = net()
    view, other = model.head.weight.data[:2], nn.Parameter(model.head.weight.data)
    tuned = attach_lora(model)
    tuned.merge()
    assert torch.equal(view, net().head.weight[:2])
    assert torch.equal(other, net().head.weight)
    tuned.unmerge()
    with torch.no_grad():
        view.zero_()
    assert not model.head.weight[:2].any()  # the same memory again


def test_a_weight_that_is_computed_is_refused() -> None:
    model = net()
    weight_norm(model.head)
    assert_merge_rejected(model, attach_lora(model, "head"), "head", "computed")


def test_a_quantised_weight_is_refused() -> None:
    model = net()
    tuned = attach_lora(model)
    model.head.weight = nn.Parameter(torch.ones(3, 6, dtype=torch.int8), requires_grad=False)
    with raises(UnsupportedSite, site="head", given="quantized or sharded"):
        tuned.merge()
    assert torch.equal(model.conv.weight, net().conv.weight)


def test_an_offloaded_weight_is_refused() -> None:
    from accelerate import cpu_offload

    model = net()
    tuned = attach_lora(model)
    cpu_offload(model, torch.device("cpu"))
    with raises(UnsupportedSite, given="offloaded"):
        tuned.merge()


def test_a_merge_on_meta() -> None:
    model = net().to("meta")
    tuned = attach(model, "lora", where=WHERE, rank=2)
    assert tuned.merge().tensors == 4
    tuned.unmerge()
    assert model.head.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unmerge_casts_the_weights_of_a_model_that_was_cast(dtype: torch.dtype) -> None:
    model = net()
    tuned = attach_lora(model)
    tuned.merge()
    model.to(dtype)
    tuned.unmerge()
    assert torch.equal(model.qkv.weight, net().to(dtype).qkv.weight)
    assert torch.equal(tuned.host_state_dict()["read.weight"], net().to(dtype).read.weight)


def test_a_merge_keeps_strides() -> None:
    model = net().to(memory_format=torch.channels_last)
    tuned = attach_lora(model)
    strides, unmerged = model.conv.weight.stride(), run(model)
    tuned.merge()
    assert model.conv.weight.stride() == strides
    torch.testing.assert_close(run(model), unmerged, rtol=0, atol=1e-5)


def test_backward_through_a_graph_from_before_the_merge_is_an_error() -> None:
    model = net()
    tuned = attach_lora(model, "head")
    x = torch.randn(2, 6, requires_grad=True)
    loss = model.head(x).sum()
    tuned.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_merged_in_inference_mode_are_not_inference_tensors() -> None:
    model = net()
    tuned = attach_lora(model)
    with torch.inference_mode():
        tuned.merge()
    assert not model.head.weight.is_inference()
    with torch.inference_mode():
        tuned.unmerge()
    assert torch.equal(model.head.weight, net().head.weight)


class FailingAdapter(Adapter):
    """W + 1 at all sites but the last, whose weight form fails."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.site = site

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.strength

    def weight(self, weight: Tensor) -> Tensor:
        if self.site.name == "head":
            raise RuntimeError("out of memory")
        return weight + self.strength


@dataclass(frozen=True)
class Failing(Method):
    """A method whose merge fails."""

    name: ClassVar[str] = "failing"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
    default: ClassVar[tuple[str, ...]] = ("attn",)

    def build(self, site: Any) -> Adapter:
        return FailingAdapter(site)


def test_a_failure_midway_leaves_nothing_changed() -> None:
    model = net()
    tuned = attach(model, Failing(), where=WHERE)
    before = run(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        tuned.merge()
    assert not tuned.merged
    assert all(torch.equal(v, net().state_dict()[k]) for k, v in tuned.host_state_dict().items())
    assert torch.equal(run(model), before)


def test_a_failure_while_seams_are_removed_leaves_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    tuned = attach_lora(model)
    before = run(model)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuned.seams[2], "uninstall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned.merge()
    monkeypatch.undo()
    assert not tuned.merged
    assert all(torch.equal(v, net().state_dict()[k]) for k, v in tuned.host_state_dict().items())
    assert torch.equal(run(model), before)

"""Merging where a weight is tied, seen by others, computed, moved or not there; and when it fails midway."""

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


def tune(model: Net, where: str = WHERE) -> Any:
    tuned = attach(model, "lora", where=where, rank=2)
    stir(tuned)
    return tuned


def refused(model: Net, tuned: Any, site: str, obstacle: str) -> None:
    """The merge raises, and weights, adapters and outputs are as before."""
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
    tuned = tune(model)
    frozen = {name: p.requires_grad for name, p in model.named_parameters() if not name.split(".")[-1].startswith(("up", "down"))}
    tuned.merge()
    assert {name: id(p) for name, p in model.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(frozen.values())
    tuned.unmerge()
    tuned.detach()
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("where", ["head", "attn.out"])
def test_of_a_tied_weight_one_module_is_changed_as_beside(where: str) -> None:
    """The read one is a parametrisation; `tail.0` holds the same parameter and stays the base's."""
    model = net()
    site = model.get_submodule({"head": "head", "attn.out": "read"}[where])
    site.weight = nn.Parameter(model.tail[0].weight[: len(site.weight)].detach().clone())
    twin = model.spare
    twin.weight = site.weight
    tied, base = twin.weight, twin.weight.detach().clone()
    tuned = tune(model, where)
    beside = run(model)
    tuned.merge()
    torch.testing.assert_close(run(model), beside, rtol=0, atol=1e-5)
    assert torch.equal(twin.weight, base)
    assert not torch.equal(site.weight, base)
    model.double()
    tuned.unmerge()
    tuned.detach()
    assert site.weight is twin.weight is tied
    assert torch.equal(tied, base.double())


def test_a_view_of_the_weight_keeps_the_base() -> None:
    """As beside the adapter, which changes what its own module gives and nothing else."""
    model = net()
    view, other = model.head.weight.data[:2], nn.Parameter(model.head.weight.data)
    tuned = tune(model)
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
    refused(model, tune(model, "head"), "head", "computed")


def test_a_quantised_weight_is_refused() -> None:
    model = net()
    tuned = tune(model)
    model.head.weight = nn.Parameter(torch.ones(3, 6, dtype=torch.int8), requires_grad=False)
    with raises(UnsupportedSite, site="head", given="quantized or sharded"):
        tuned.merge()
    assert torch.equal(model.conv.weight, net().conv.weight)


def test_an_offloaded_weight_is_refused() -> None:
    from accelerate import cpu_offload

    model = net()
    tuned = tune(model)
    cpu_offload(model, torch.device("cpu"))
    with raises(UnsupportedSite, given="offloaded"):
        tuned.merge()


def test_on_meta_nothing_is_computed() -> None:
    model = net().to("meta")
    tuned = attach(model, "lora", where=WHERE, rank=2)
    assert tuned.merge().tensors == 4
    tuned.unmerge()
    assert model.head.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_cast_while_merged_gets_its_own_weights_cast(dtype: torch.dtype) -> None:
    model = net()
    tuned = tune(model)
    tuned.merge()
    model.to(dtype)
    tuned.unmerge()
    assert torch.equal(model.qkv.weight, net().to(dtype).qkv.weight)
    assert torch.equal(tuned.host_state_dict()["read.weight"], net().to(dtype).read.weight)


def test_strides_stay() -> None:
    model = net().to(memory_format=torch.channels_last)
    tuned = tune(model)
    strides, beside = model.conv.weight.stride(), run(model)
    tuned.merge()
    assert model.conv.weight.stride() == strides
    torch.testing.assert_close(run(model), beside, rtol=0, atol=1e-5)


def test_a_graph_from_before_the_merge_is_not_used_after_it() -> None:
    model = net()
    tuned = tune(model, "head")
    x = torch.randn(2, 6, requires_grad=True)
    loss = model.head(x).sum()
    tuned.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_inference_mode_weights_stay_ordinary() -> None:
    model = net()
    tuned = tune(model)
    with torch.inference_mode():
        tuned.merge()
    assert not model.head.weight.is_inference()
    with torch.inference_mode():
        tuned.unmerge()
    assert torch.equal(model.head.weight, net().head.weight)


class FailingAdapter(Adapter):
    """W + 1 at all sites but the last, whose weight form fails."""

    blends: ClassVar[bool] = True

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
    """A method that fails while it is merged."""

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


def test_a_failure_while_seams_part_leaves_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    tuned = tune(model)
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

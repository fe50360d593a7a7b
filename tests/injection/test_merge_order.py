"""Several attachments merged into one weight, in each order, and unmerged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.injection.toy import Net, net, run, stir
from tests.raising import raises
from veneer.injection import StateError, attach, merges


def pair(model: Net, *names: str) -> list[Any]:
    """Attachments on the fused `qkv`'s first rows and on the head, in this order."""
    attached = [attach(model, name, where="attn.q head", rank=2, name=f"{name}{i}") for i, name in enumerate(names)]
    for i, tuned in enumerate(attached):
        stir(tuned, 0.3 + 0.1 * i)
    return attached


def changed(weight: Tensor, tuned: Any, site: str) -> Tensor:
    """LoRA's W + B A, and DoRA's (‖W‖ + δ) / ‖W + B A‖ of it, row by row."""
    adapter = tuned.parts[site][1]
    up, down = adapter.up.detach().double(), adapter.down.detach().double()
    after = weight + torch.einsum("or,ri->oi", up, down)
    if tuned.method.name == "lora":
        return after
    length = weight.pow(2).sum(1).sqrt() + adapter.magnitude_delta.detach().double()
    return after * (length / after.pow(2).sum(1).sqrt())[:, None]


def expected(*order: Any) -> dict[str, Tensor]:
    """The two weights with the attachments applied in this order."""
    tensors = {"qkv.q": net().qkv.weight.detach().double()[:6], "head": net().head.weight.detach().double()}
    for tuned in order:
        tensors = {site: changed(weight, tuned, site) for site, weight in tensors.items()}
    return tensors


def weights(model: Net) -> dict[str, Tensor]:
    return {"qkv.q": model.qkv.weight.detach().double()[:6], "head": model.head.weight.detach().double()}


@pytest.mark.parametrize("names", [("dora", "lora"), ("lora", "dora")])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_merged_is_applied_first(names: tuple[str, str], reverse: bool) -> None:
    model = net()
    order = pair(model, *names)[:: -1 if reverse else 1]
    for tuned in order:
        tuned.merge()
    for site, weight in expected(*order).items():
        torch.testing.assert_close(weights(model)[site], weight, rtol=0, atol=2e-6)
        assert (weight - expected(*reversed(order))[site]).abs().max() > 1e-2  # the reverse order gives another weight
    assert torch.equal(model.qkv.weight[6:], net().qkv.weight[6:])
    assert [m.attachment for m in merges(model)] == order


def test_sums_agree_in_both_orders() -> None:
    for step in (1, -1):
        model = net()
        order = pair(model, "lora", "lora")[::step]
        for tuned in order:
            tuned.merge()
        for site, weight in expected(*order[::step]).items():
            torch.testing.assert_close(weights(model)[site], weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_merging_in_the_order_of_attaching_keeps_the_outputs(count: int) -> None:
    model = net()
    order = pair(model, "dora", "lora")
    unmerged = run(model)
    for tuned in order[:count]:
        tuned.merge()
    torch.testing.assert_close(run(model), unmerged, rtol=1e-5, atol=1e-5)
    for tuned in reversed(order[:count]):
        tuned.unmerge()
    assert torch.equal(run(model), unmerged)  # in the order of attaching again


def test_unmerging_out_of_order_is_an_error_and_changes_nothing() -> None:
    model = net()
    first, second = pair(model, "dora", "lora")
    first.scale = 0.5
    first.merge()
    second.merge()
    after = weights(model)
    with raises(StateError, where="dora0", given="merged", expected="lora1"):
        first.unmerge()
    assert all(torch.equal(weights(model)[site], weight) for site, weight in after.items())
    assert [(m.name, m.scale) for m in merges(model)] == [("dora0", 0.5), ("lora1", 1.0)]
    second.unmerge()
    first.unmerge()
    assert merges(model) == []
    assert torch.equal(model.qkv.weight, net().qkv.weight)


def test_a_copy_of_a_merged_model_can_be_unmerged() -> None:
    model = net()
    first, second = pair(model, "dora", "lora")
    first.merge()
    second.merge()
    twin = copy.deepcopy(model)
    for merge in reversed(merges(twin)):
        merge.attachment.unmerge()
    assert torch.equal(twin.qkv.weight, net().qkv.weight)
    assert [m.attachment for m in merges(model)] == [first, second]
    assert not torch.equal(model.qkv.weight, net().qkv.weight)

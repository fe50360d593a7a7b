"""Several attachments in one weight: what each order gives, and the way back."""

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
    made = [attach(model, name, where="attn.q head", rank=2, name=f"{name}{i}") for i, name in enumerate(names)]
    for i, tuned in enumerate(made):
        stir(tuned, 0.3 + 0.1 * i)
    return made


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
    """The two weights after these, the first first."""
    found = {"qkv.q": net().qkv.weight.detach().double()[:6], "head": net().head.weight.detach().double()}
    for tuned in order:
        found = {site: changed(weight, tuned, site) for site, weight in found.items()}
    return found


def weights(model: Net) -> dict[str, Tensor]:
    return {"qkv.q": model.qkv.weight.detach().double()[:6], "head": model.head.weight.detach().double()}


@pytest.mark.parametrize("names", [("dora", "lora"), ("lora", "dora")])
@pytest.mark.parametrize("turned", [False, True])
def test_the_first_merged_is_applied_first(names: tuple[str, str], turned: bool) -> None:
    model = net()
    order = pair(model, *names)[:: -1 if turned else 1]
    for tuned in order:
        tuned.merge()
    for site, weight in expected(*order).items():
        torch.testing.assert_close(weights(model)[site], weight, rtol=0, atol=2e-6)
        assert (weight - expected(*reversed(order))[site]).abs().max() > 1e-2  # the other order is another weight
    assert torch.equal(model.qkv.weight[6:], net().qkv.weight[6:])
    assert [m.attachment for m in merges(model)] == order


def test_sums_agree_in_both_orders() -> None:
    for turn in (1, -1):
        model = net()
        order = pair(model, "lora", "lora")[::turn]
        for tuned in order:
            tuned.merge()
        for site, weight in expected(*order[::turn]).items():
            torch.testing.assert_close(weights(model)[site], weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_merged_in_the_order_of_attaching_outputs_stay(count: int) -> None:
    model = net()
    order = pair(model, "dora", "lora")
    beside = run(model)
    for tuned in order[:count]:
        tuned.merge()
    torch.testing.assert_close(run(model), beside, rtol=1e-5, atol=1e-5)
    for tuned in reversed(order[:count]):
        tuned.unmerge()
    assert torch.equal(run(model), beside)  # the first acts first again


def test_out_of_order_is_an_error_and_changes_nothing() -> None:
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


def test_a_copy_of_a_merged_model_has_its_own_way_back() -> None:
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

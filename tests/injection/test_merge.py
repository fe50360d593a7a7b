"""Merging against W + ΔW built by hand; unmerging bitwise."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.injection import StateError, UnsupportedSite, attach

from .toy import Add, Net, net, run, stir

WHERE = "embed.token conv attn.{q,v,out} head"


def dense(tuned: object, scale: float = 1.0) -> dict[str, Tensor]:
    """W + scale·s·B A for every adapted tensor, element by element from the definition."""
    model = net()
    state = {k: v.double() for k, v in model.state_dict().items()}
    for site, adapter in tuned.parts.values():
        up, down = adapter.up.detach().double(), adapter.down.detach().double()
        if site.kind == "embedding":
            change = torch.einsum("ir,or->io", down, up)
        elif site.kind == "conv":  # a pair of factors per group, on the group's own outputs and inputs
            change = torch.zeros(6, 1, 3, 3, dtype=torch.float64)
            for out in range(6):
                group = out // 3
                for r in range(1):
                    change[out, 0] += up[out, r, 0, 0] * down[group * 1 + r, 0]
        else:
            change = torch.einsum("or,ri->oi", up, down)
        rows = slice(*site.rows) if site.rows else slice(None)
        state[f"{site.path}.weight"][rows] += scale * 1.5 * change
    return state


def tune(model: Net) -> object:
    tuned = attach(model, "lora", where=WHERE, rank=2, alpha=3.0)
    stir(tuned)
    return tuned


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_merged_weights_are_the_weights_plus_the_change(scale: float) -> None:
    model = net()
    tuned = tune(model)
    tuned.scale = scale
    beside = run(model)
    report = tuned.merge()
    expected = dense(tuned, scale)
    assert list(model.state_dict()) == list(expected)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=0, atol=1e-6, msg=key)
    explicit = net().double()
    explicit.load_state_dict(expected)
    torch.testing.assert_close(run(model).double(), run(explicit), rtol=0, atol=1e-5)
    torch.testing.assert_close(run(model), beside, rtol=0, atol=1e-5)
    assert report.tensors == 5
    assert report.kept_bytes == 4 * (7 * 6 + 6 * 9 + 18 * 6 + 6 * 6 + 3 * 6)
    largest = max((expected[k] - v.double()).abs().max().item() for k, v in net().state_dict().items())
    assert report.largest_change == pytest.approx(largest, abs=1e-6)


def test_unmerge_is_bitwise_and_the_adapters_are_back() -> None:
    model = net()
    tuned = tune(model)
    beside = run(model)
    tuned.merge()
    tuned.unmerge()
    assert torch.equal(run(model), beside)
    assert all(torch.equal(v, net().state_dict()[k]) for k, v in tuned.host_state_dict().items())
    tuned.detach()
    assert torch.equal(run(model), run(net()))


def test_merges_come_apart_in_reverse() -> None:
    model = net()
    first, second = (attach(model, "lora", where="attn.q", rank=2) for _ in range(2))
    for tuned in (first, second):
        stir(tuned)
        tuned.merge()
    with pytest.raises(StateError, match=r"'lora_2' was merged after 'lora'\. Unmerge it first"):
        first.unmerge()
    second.unmerge()
    first.unmerge()
    assert torch.equal(model.qkv.weight, net().qkv.weight)


def test_a_merge_beside_another_attachment_changes_nothing_of_it() -> None:
    model = net()
    first, second = (attach(model, "lora", where="attn.out conv", rank=2) for _ in range(2))
    stir(first)
    stir(second, 0.1)
    before = run(model)
    first.merge()
    torch.testing.assert_close(run(model), before, rtol=0, atol=1e-5)
    second.detach()
    first.unmerge()
    first.detach()
    assert torch.equal(run(model), run(net()))


def test_a_method_without_a_weight_form_is_refused_and_nothing_changes() -> None:
    model = net()
    tuned = attach(model, Add(), where="inner")
    with pytest.raises(UnsupportedSite, match=r"inner.branch: AddAdapter has no weight form"):
        tuned.merge()
    assert not tuned.merged
    run(model)


def test_off_means_off_in_a_merge_too() -> None:
    model = net()
    tuned = tune(model)
    with tuned.enabled(False):
        report = tuned.merge()
    assert report.largest_change == 0
    assert torch.equal(F.linear(torch.eye(6), model.head.weight), F.linear(torch.eye(6), net().head.weight))

"""Merging against W + ΔW built by hand; unmerging bitwise."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.injection.toy import Add, Net, net, run, stir
from tests.raising import raises
from veneer.injection import StateError, UnsupportedSite, attach, merges
from veneer.injection.composition.merge import merged_weight
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank.lora import LoRA

WHERE = "embed.token conv attn.{q,v,out} head"
METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 2, "target_rank": 1}, "bitfit": {"where": "bias"}, "boft": {"m": 1, "b": 3},
    "diffusekrona": {"a1": 3, "a2": 1}, "dora": {"rank": 2}, "fact": {"where": "attn.{q,v,out} head"}, "glora": {},
    "ia3": {"inputs": ("head",)}, "loha": {"rank": 2}, "lokr": {}, "lora": {"rank": 2}, "lora_fa": {"rank": 2},
    "oft": {"blocks": 3}, "svdiff": {}, "vera": {"rank": 5},
}  # fmt: skip
"""Methods with a weight form, with options for the small model."""


def dense(tuned: Any, scale: float = 1.0, base: Any = None) -> dict[str, Tensor]:
    """W + scale·s·B A for every adapted tensor, computed from the definition."""
    state = {k: tensor_at(base or net(), k).double() for k in net().state_dict()}
    for site, adapter in tuned.parts.values():
        up, down = adapter.up.detach().double(), adapter.down.detach().double()
        if site.kind == "embedding":
            delta = torch.einsum("ir,or->io", down, up)
        elif site.kind == "conv":  # a pair of factors per group, on the group's own outputs and inputs
            delta = torch.zeros(6, 1, 3, 3, dtype=torch.float64)
            for out in range(6):
                group = out // 3
                for r in range(1):
                    delta[out, 0] += up[out, r, 0, 0] * down[group * 1 + r, 0]
        else:
            delta = torch.einsum("or,ri->oi", up, down)
        rows = slice(*site.rows) if site.rows else slice(None)
        state[f"{site.path}.weight"][rows] += scale * 1.5 * delta
    return state


def attach_lora(model: Net) -> Any:
    tuned = attach(model, "lora", where=WHERE, rank=2, alpha=3.0)
    stir(tuned)
    return tuned


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_merged_weights_are_the_base_weights_plus_the_delta(scale: float) -> None:
    model = net()
    tuned = attach_lora(model)
    tuned.scale = scale
    unmerged = run(model)
    report = tuned.merge()
    expected = dense(tuned, scale)
    assert list(model.state_dict()) == list(expected)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=0, atol=1e-6, msg=key)
    bare = net().double()
    bare.load_state_dict(expected)
    torch.testing.assert_close(run(model).double(), run(bare), rtol=0, atol=1e-5)
    torch.testing.assert_close(run(model), unmerged, rtol=0, atol=1e-5)
    assert report.tensors == 5
    assert report.stored_bytes == 4 * (7 * 6 + 6 * 9 + 18 * 6 + 6 * 6 + 3 * 6)


def test_unmerge_is_bitwise_and_reinstalls_the_adapters() -> None:
    model = net()
    tuned = attach_lora(model)
    unmerged = run(model)
    tuned.merge()
    tuned.unmerge()
    assert torch.equal(run(model), unmerged)
    assert all(torch.equal(v, net().state_dict()[k]) for k, v in tuned.host_state_dict().items())
    tuned.detach()
    assert torch.equal(run(model), run(net()))


def test_attachments_are_unmerged_in_reverse_order() -> None:
    model = net()
    first, second = (attach(model, "lora", where="attn.q", rank=2) for _ in range(2))
    for tuned in (first, second):
        stir(tuned)
        tuned.merge()
    with raises(StateError, where="lora", given="merged", expected="lora_2"):
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
    with raises(UnsupportedSite, site="inner.branch", given="AddAdapter", expected="weight"):
        tuned.merge()
    assert not tuned.merged
    run(model)


def test_a_disabled_attachment_merges_nothing() -> None:
    model = net()
    tuned = attach_lora(model)
    with tuned.enabled(False):
        tuned.merge()
    assert [(m.name, m.scale) for m in merges(model)] == [("lora", 0.0)]
    assert torch.equal(F.linear(torch.eye(6), model.head.weight), F.linear(torch.eye(6), net().head.weight))


@pytest.mark.parametrize("name", METHODS)
def test_every_merged_weight_form_gives_the_unmerged_output(name: str) -> None:
    """W' equals weight(W) up to single precision, and the outputs equal the unmerged ones up to 1e-5."""
    model = net()
    tuned = attach_with_noise(model, name)
    unmerged, expected = run(model), explicit_weights(tuned)
    tuned.merge()
    for key, tensor in expected.items():
        torch.testing.assert_close(tensor_at(model, key).double(), tensor, rtol=0, atol=2e-6, msg=key)
    torch.testing.assert_close(run(model), unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_in_bfloat16_the_sum_is_rounded_once(name: str, narrow: bool) -> None:
    """Each value is within half a unit in the last place of bfloat16. `narrow`: the adapters are bfloat16 as well."""
    model = net().bfloat16()
    tuned = attach_with_noise(model, name)
    if narrow:
        model.bfloat16()
    expected = explicit_weights(tuned)
    tuned.merge()
    for key, tensor in expected.items():
        half_step = 2.0 ** (torch.frexp(tensor)[1] - 9).double()
        assert bool(((tensor_at(model, key).double() - tensor).abs() <= half_step * 1.001 + 1e-6).all()), key


@pytest.mark.parametrize("name", METHODS)
def test_a_hundred_merges_restore_the_weights_in_bfloat16(name: str) -> None:
    model = net().bfloat16()
    before, addresses = {k: v.clone() for k, v in model.state_dict().items()}, {p: p.data_ptr() for p in model.parameters()}
    tuned = attach_with_noise(model, name)
    for _ in range(101):
        tuned.merge()
        tuned.unmerge()
    tuned.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {p: p.data_ptr() for p in model.parameters()} == addresses  # the same memory


@pytest.mark.parametrize("narrow", [False, True])
def test_in_bfloat16_the_merged_weight_is_bitwise_the_sum_rounded_once(narrow: bool) -> None:
    """With values whose sums and products are exact in single precision. `narrow`: the adapters are bfloat16 as well."""
    model = net().bfloat16()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-255, 256, p.shape, generator=generator) / 256)
        tuned = attach(model, "lora", where=WHERE, rank=2, alpha=3.0)
        for p in tuned.parameters():
            p.copy_(torch.randint(-15, 16, p.shape, generator=generator) / 16)
    if narrow:
        model.bfloat16()
    expected = dense(tuned, base=model)
    tuned.merge()
    changed = {f"{site.path}.weight" for site, _ in tuned.parts.values()}
    assert all(torch.equal(tensor_at(model, key), expected[key].to(torch.bfloat16)) for key in changed)
    assert {next(a.parameters()).dtype for _, a in tuned.parts.values()} == {torch.bfloat16 if narrow else torch.float32}


def test_autocast_does_not_reach_the_merged_weights() -> None:
    model = net()
    tuned = attach_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        tuned.merge()
    for key, tensor in dense(tuned).items():
        torch.testing.assert_close(model.state_dict()[key].double(), tensor, rtol=0, atol=1e-6, msg=key)


def test_large_weights_are_merged_block_by_block() -> None:
    """A weight that is larger than a block, and whose rows are not a multiple of it."""
    layer = torch.nn.Sequential(torch.nn.Linear(1500, 1501, bias=False)).bfloat16()
    site = WeightSite(name="0", role="l", path="0", d_out=1501, d_in=1500)
    adapter = LoRA(rank=2).build(site)
    with torch.no_grad():
        adapter.up.normal_()
        expected = layer[0].weight.float() + adapter.up @ adapter.down
    for weight in (layer[0].weight, layer[0].weight.float(), layer[0].weight.T.contiguous().T):
        with torch.no_grad():
            after = merged_weight(weight, [(site, adapter)])
        step = 2**-7 if weight.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(after, expected.to(weight.dtype), rtol=step, atol=1e-5)
        assert after.stride() == weight.stride()


def attach_with_noise(model: Net, name: str) -> Any:
    """Attaches a method and adds noise to its parameters."""
    tuned = attach(model, name, **{"where": WHERE.removeprefix("embed.token "), **METHODS[name]})
    stir(tuned)
    return tuned


def explicit_weights(tuned: Any) -> dict[str, Tensor]:
    """weight(W) of every tensor in double precision."""
    tensors: dict[str, Tensor] = {}
    for site, adapter in tuned.parts.values():
        key = f"{site.path}.{site.param}"
        weight = tensors.setdefault(key, tensor_at(tuned.towers[""], key).detach().double().clone())
        rows = slice(*site.rows) if site.rows else slice(None)
        memo = {id(adapter.host): adapter.host} if hasattr(adapter, "host") else {}
        with torch.no_grad():
            weight[rows] = copy.deepcopy(adapter, memo).double().weight(weight[rows])
    return tensors


def tensor_at(model: Any, key: str) -> Tensor:
    return base_tensor(model, *key.rsplit(".", 1))

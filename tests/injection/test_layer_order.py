"""Two methods on one layer: the later one changes the result of the earlier one, with hooks and parametrizations."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.injection.toy import ToyHost, net, stir
from veneer.injection import Attachment, SelectionError, UnsupportedSite, attach, attachments, hosts, methods
from veneer.injection.attachment.plan import supports
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.seams.adapter_calls import blend
from veneer.injection.sites import BranchSite, WeightSite
from veneer.methods.reparameterized.kronecker.loha import LoHa
from veneer.methods.reparameterized.kronecker.lokr import LoKr
from veneer.methods.reparameterized.low_rank.dora import DoRA
from veneer.methods.reparameterized.low_rank.repadapter import RepAdapter
from veneer.testing.snapshot import assert_same, snapshot

SMALL: dict[str, dict[str, Any]] = {
    "oft": {"block_size": 3},
    "boft": {"m": 1, "b": 3},
    "diffusekrona": {"a1": 3, "a2": 2},
}
"""Options for layers of 6 inputs, for methods whose example needs wider layers."""
DECOMPOSED = [kind(rank=2, norm_axis=axis) for kind, axis in ((LoHa, "input"), (LoKr, "output"), (DoRA, "input"))]
PARTNERS = frozenset({"lora", "dora", "ssf", "norm_tuning"})
"""A method that adds to the weight, one that depends on it, one that scales the output and its bias, and one of norms."""
SELECTIONS = {
    "plain": ("head", "bias.head"),
    "sliced": ("attn.q", "attn.v"),
    "read": ("attn.out", "bias.attn.out"),
    "conv": ("conv", "bias.conv"),
    "norm": ("norm",),
}
"""A called layer, slices of a called layer, a layer that is read, a grouped convolution, and a called norm."""


def attach_with_noise(model: nn.Module, name: str | Method, where: tuple[str, ...]) -> Attachment | None:
    """Attaches a method at all of the sites, or at one of them, and adds noise to it. None if it supports none of them."""
    method = name if isinstance(name, Method) else methods.get(name)(**SMALL[name]) if name in SMALL else example(name)
    for selection in (where, *((one,) for one in where)):
        torch.manual_seed(len(method.name))
        try:
            attachment = attach(model, method, where=selection)
        except (SelectionError, UnsupportedSite):
            continue
        if attachment.method.selects:
            attachment.select(output(model).square().mean() for _ in range(2))
        attachment.begin_pass(0, 0)
        stir(attachment)
        return attachment
    return None


def example(name: str) -> Method:
    return methods.get(name).examples()[0]


def methods_with_weight_form(where: tuple[str, ...]) -> list[str]:
    """Methods that support these sites and have weight forms there."""
    sites = [s for s in ToyHost().sites(net()) if not isinstance(s, BranchSite)]
    names = [n for n in methods.names() if any(supports(methods.get(n), s) for s in sites)]
    tuned = {name: attach_with_noise(net().double(), name, where) for name in names}
    return [name for name, a in tuned.items() if a is not None and all(hasattr(p, "weight") for _, p in a.parts.values())]


def output(model: nn.Module) -> Tensor:
    y: Tensor = model(**ToyHost().sample(model))
    return y


def dense_output(*attached: Attachment) -> Tensor:
    """The differentiable output of a bare model with the weight and bias forms applied one after the other."""
    bare = net().double()
    tensors = {name: p.detach() for name, p in bare.named_parameters()}
    for attachment in attached:
        for site, part in attachment.parts.values():
            adapter: Any = part
            name, rows = f"{site.path}.{site.param}", slice(*(site.rows or (None,)))
            weight = tensors[name][rows]
            if hasattr(adapter, "bias"):
                form = functools.partial(bias_form, adapter, weight)
                tensors[site.bias] = replace_rows(tensors[site.bias], rows, blend(adapter, form, tensors[site.bias][rows]))
            tensors[name] = replace_rows(tensors[name], rows, blend(adapter, adapter.weight, weight))
    y: Tensor = torch.func.functional_call(bare, tensors, (), ToyHost().sample(bare))
    return y


def bias_form(adapter: Any, weight: Tensor, bias: Tensor) -> Tensor:
    return adapter.bias(bias, lambda: weight)


def replace_rows(tensor: Tensor, rows: slice, values: Tensor) -> Tensor:
    return torch.cat([tensor[: rows.start or 0], values, tensor[len(tensor) if rows.stop is None else rows.stop :]])


def gradients(y: Tensor, attached: tuple[Attachment, ...]) -> list[Tensor]:
    parameters = [p for a in attached for p in a.parameters()]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def largest_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest value of each tensor, or to 1 if that is greater."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(actual, expected, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_ordered_pairs_equal_their_composition(selection: str) -> None:
    """Outputs, gradients and merged outputs of each method before and after each of `PARTNERS` against changed tensors."""
    where = SELECTIONS[selection]
    errors = {}
    supported = methods_with_weight_form(where)
    assert selection == "norm" or {"lora", "dora", "ia3", "glora", "full"} <= {*supported}
    for names in itertools.permutations(supported, 2):
        if PARTNERS.isdisjoint(names):
            continue
        model = net().double()
        pair = tuple(a for name in names if (a := attach_with_noise(model, name, where)) is not None)
        assert len(pair) == 2, names
        actual, expected = output(model), dense_output(*pair)
        error = largest_difference([actual, *gradients(actual, pair)], [expected, *gradients(expected, pair)])
        for attachment in pair:
            attachment.merge()
        error = max(error, largest_difference([output(model)], [expected]))
        if error > 1e-9:
            errors[names] = error
    assert not errors


PAIRS = [
    pytest.param("lora", "repadapter", SELECTIONS["sliced"], id="lora-repadapter-sliced"),
    pytest.param("dora", "repadapter", SELECTIONS["sliced"], id="dora-repadapter-sliced"),
    pytest.param("lora", "linear_probe", SELECTIONS["plain"], id="lora-linear_probe-head"),
    pytest.param("ssf", "glora", SELECTIONS["plain"], id="ssf-glora-head"),
    pytest.param("repadapter", "full", SELECTIONS["plain"], id="repadapter-full-head"),
    pytest.param("ssf", "norm_tuning", SELECTIONS["norm"], id="ssf-norm_tuning-norm"),
]


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reversed"])
@pytest.mark.parametrize(("one", "other", "where"), PAIRS)
def test_disabled_and_detached_in_any_order_bitwise(one: str, other: str, where: tuple[str, ...], reverse: bool) -> None:
    names = (other, one) if reverse else (one, other)
    alone: dict[str, Tensor] = {}
    for name in names:
        single = net()
        attach_with_noise(single, name, where)
        alone[name] = output(single)
    for leaving, staying in ((0, 1), (1, 0)):
        model = net()
        before = snapshot(model)
        pair = [attach_with_noise(model, name, where) for name in names]
        both = output(model)
        with pair[leaving].enabled(False):
            assert torch.equal(output(model), alone[names[staying]])
        assert torch.equal(output(model), both)
        pair[leaving].detach()
        assert torch.equal(output(model), alone[names[staying]])
        assert attachments(model) == [pair[staying]]
        pair[staying].detach()
        assert_same(before, snapshot(model), "both detached")


@pytest.mark.parametrize(("one", "other", "where"), PAIRS)
def test_merged_and_unmerged_equal_both_attached(one: str, other: str, where: tuple[str, ...]) -> None:
    """Also if the earlier one is merged and unmerged while the later one is attached."""
    model = net().double()
    first, second = attach_with_noise(model, one, where), attach_with_noise(model, other, where)
    both = output(model)
    first.merge()
    torch.testing.assert_close(output(model), both)
    first.unmerge()
    assert torch.equal(output(model), both)
    state = {key: tensor.clone() for key, tensor in second.state_dict().items()}
    second.detach()
    first.merge()
    second = attach_with_noise(model, other, where)
    second.load_state_dict(state)
    first.unmerge()
    assert torch.equal(output(model), both)
    assert torch.equal(output(copy.deepcopy(model)), both)


def test_lora_before_repadapter_on_slices_is_w_plus_ba_times_i_plus_r() -> None:
    """q = (W + B A)(x + U (D x + a) + c) + b, in both orders."""
    model = net().double()
    slices = {"where": "attn.q"}
    lora = attach(model, "lora", rank=2, **slices)
    rep = attach(model, RepAdapter(bottleneck=2, up_groups=1, dropout=0.0), **slices)
    stir(lora), stir(rep)
    ((_, lora_adapter),), ((_, rep_adapter),) = lora.parts.values(), rep.parts.values()
    bare: Any = net().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    changed_x = x + (x @ rep_adapter.down.T + rep_adapter.down_bias) @ rep_adapter.up.T + rep_adapter.up_bias
    weight, bias = bare.qkv.weight[:6], bare.qkv.bias[:6]
    expected = changed_x @ (weight + lora_adapter.up @ lora_adapter.down).T + bias
    torch.testing.assert_close(model.qkv(x)[:, :6], expected)
    torch.testing.assert_close(model.qkv(x)[:, 6:], bare.qkv(x)[:, 6:])
    lora.detach()
    lora = attach(model, "lora", rank=2, **slices)
    stir(lora)
    ((_, lora_adapter),) = lora.parts.values()
    delta = lora_adapter.up @ lora_adapter.down
    torch.testing.assert_close(model.qkv(x)[:, :6], changed_x @ weight.T + bias + x @ delta.T)


def test_a_linear_probe_replaces_a_head_with_a_lora() -> None:
    model = net().double()
    attach_with_noise(model, "lora", ("head",))
    probe = attach_with_noise(model, "linear_probe", SELECTIONS["plain"])
    weight, bias = (p.detach() for p in probe.parameters())
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(model.head(x), x @ weight.T + bias)
    with probe.enabled(False):
        assert not torch.equal(model.head(x), net().double().head(x))


def test_sums_and_other_rows_keep_their_hooks() -> None:
    """A LoRA with a later sum in the weight, or with later slices of other rows, is applied by its hook."""
    for other, where in (("repadapter", "attn.v"), ("lora", "attn.q")):
        model = net()
        lora = attach(model, "lora", where="attn.q")
        attach(model, other, where=where)
        assert not any(seam.in_weights() for seam in lora.seams)
    model = net()
    assert attach(model, "lora", where="attn.q").seams[0].layer_orders == ()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_sum_does_not_depend_on_the_weight(selection: str) -> None:
    where = SELECTIONS[selection]
    attached = [attach_with_noise(net().double(), name, where) for name in [*methods_with_weight_form(where), *DECOMPOSED]]
    for attachment in filter(None, attached):
        for site, adapter in attachment.parts.values():
            if adapter.adds:
                shape = getattr(site, "weight_shape", None) or getattr(site, "shape", (6,))
                w1, w2 = torch.randn(2, *shape, dtype=torch.float64)
                torch.testing.assert_close(adapter.weight(w1) - w1, adapter.weight(w2) - w2)


class DoubleAdapter(Adapter):
    """An output form without a weight form."""

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * y


class Double(Method):
    name: ClassVar[str] = "double"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
    default: ClassVar[tuple[str, ...]] = ("head",)

    def build(self, site: Any) -> Adapter:
        return DoubleAdapter()


def test_an_adapter_without_a_weight_form_is_rejected_before_a_later_weight_change() -> None:
    model = net()
    attach(model, Double())
    before = snapshot(model)
    with pytest.raises(UnsupportedSite) as raised:
        attach(model, "full", where="head")
    assert raised.value.site == "head"
    assert_same(before, snapshot(model), "rejected")
    other = net()
    attach(other, "full", where="head")
    attach(other, Double())
    torch.testing.assert_close(other.head(torch.ones(6)), 2 * net().head(torch.ones(6)))


def test_a_shift_without_a_bias_is_rejected_before_a_later_weight_change() -> None:
    model = next(iter(hosts.get("timm_conv")().tiny().values()))()
    where = first_conv(model)
    attach(model, "ssf", where=where)
    before = snapshot(model)
    with pytest.raises(UnsupportedSite) as raised:
        attach(model, "full", where=where)
    assert raised.value.site == where.removeprefix("name:")
    assert_same(before, snapshot(model), "rejected")


def first_conv(model: nn.Module) -> str:
    """A called convolution without a bias."""
    return next(f"name:{s.name}" for s in veneer.sites(model) if isinstance(s, WeightSite) and s.kind == "conv" and not s.bias)


def test_the_order_holds_when_compiled() -> None:
    model = net().double()
    expected = dense_output(
        attach_with_noise(model, "lora", SELECTIONS["sliced"]), attach_with_noise(model, "repadapter", SELECTIONS["sliced"])
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**ToyHost().sample(model)), expected)

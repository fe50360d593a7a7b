"""Two weight methods on one layer: the later one changes what the earlier one made, however each of them acts."""

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
from veneer.injection.attachment.plan import fits
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.seams.adapter_calls import blend
from veneer.injection.sites import BranchSite, WeightSite
from veneer.methods.reparameterized.dora import DoRA
from veneer.methods.reparameterized.loha import LoHa
from veneer.methods.reparameterized.lokr import LoKr
from veneer.methods.reparameterized.repadapter import RepAdapter
from veneer.testing.snapshot import assert_same, snapshot

SMALL: dict[str, dict[str, Any]] = {
    "oft": {"block_size": 3},
    "boft": {"m": 1, "b": 3},
    "diffusekrona": {"a1": 3, "a2": 2},
}
"""Options for layers of 6 inputs, where a method's example asks for more."""
DECOMPOSED = [kind(rank=2, norm_axis=axis) for kind, axis in ((LoHa, "input"), (LoKr, "output"), (DoRA, "input"))]
PLACES = {
    "plain": ("head", "bias.head"),
    "sliced": ("attn.q", "attn.v"),
    "read": ("attn.out", "bias.attn.out"),
    "conv": ("conv", "bias.conv"),
    "norm": ("norm",),
}
"""A called layer, slices of a called layer, a layer that is read, a grouped convolution, and a called norm."""


def put(model: nn.Module, name: str | Method, where: tuple[str, ...]) -> Attachment | None:
    """A method at those of the sites that it can take, off its initial values; None where it takes none."""
    method = name if isinstance(name, Method) else methods.get(name)(**SMALL[name]) if name in SMALL else example(name)
    for selection in (where, *((one,) for one in where)):
        torch.manual_seed(len(method.name))
        try:
            attachment = attach(model, method, where=selection)
        except (SelectionError, UnsupportedSite):
            continue
        stir(attachment)
        return attachment
    return None


def example(name: str) -> Method:
    return methods.get(name).examples()[0]


def able(where: tuple[str, ...]) -> list[str]:
    """Methods that can be at these sites and be written into tensors."""
    sites = [s for s in ToyHost().sites(net()) if not isinstance(s, BranchSite)]
    names = [n for n in methods.names() if any(fits(methods.get(n), s) for s in sites)]
    tuned = {name: put(net().double(), name, where) for name in names}
    return [n for n, t in tuned.items() if t is not None and all(hasattr(a, "weight") for _, a in t.parts.values())]


def output(model: nn.Module) -> Tensor:
    found: Tensor = model(**ToyHost().sample(model))
    return found


def dense(*several: Attachment) -> Tensor:
    """The output of a bare model whose tensors hold all changes, one attachment after the other; with a graph."""
    plain = net().double()
    held = {name: p.detach() for name, p in plain.named_parameters()}
    for attachment in several:
        for site, adapter in attachment.parts.values():
            change: Any = adapter
            name, at = f"{site.path}.{site.param}", slice(*(site.rows or (None,)))
            before = held[name][at]
            if hasattr(change, "bias"):
                form = functools.partial(shifted, change, before)
                held[site.bias] = changed(held[site.bias], at, blend(change, form, held[site.bias][at]))
            held[name] = changed(held[name], at, blend(change, change.weight, before))
    found: Tensor = torch.func.functional_call(plain, held, (), ToyHost().sample(plain))
    return found


def shifted(adapter: Any, weight: Tensor, bias: Tensor) -> Tensor:
    return adapter.bias(bias, lambda: weight)


def changed(tensor: Tensor, at: slice, rows: Tensor) -> Tensor:
    return torch.cat([tensor[: at.start or 0], rows, tensor[len(tensor) if at.stop is None else at.stop :]])


def gradients(found: Tensor, several: tuple[Attachment, ...]) -> list[Tensor]:
    parameters = [p for a in several for p in a.parameters()]
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    grads = torch.autograd.grad((found * weights).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def apart(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest value of each tensor, or 1."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(got, expected, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


@pytest.mark.parametrize("place", PLACES)
def test_all_ordered_pairs_equal_their_composition(place: str) -> None:
    """Outputs, gradients and merged outputs of every ordered pair of methods against dense tensors."""
    where = PLACES[place]
    wrong = {}
    names_here = able(where)
    assert place == "norm" or {"lora", "dora", "ia3", "glora", "full"} <= {*names_here}
    for names in itertools.permutations(names_here, 2):
        model = net().double()
        pair = tuple(a for name in names if (a := put(model, name, where)) is not None)
        assert len(pair) == 2, names
        found, expected = output(model), dense(*pair)
        off = apart([found, *gradients(found, pair)], [expected, *gradients(expected, pair)])
        for attachment in pair:
            attachment.merge()
        off = max(off, apart([output(model)], [expected]))
        if off > 1e-9:
            wrong[names] = off
    assert not wrong


PAIRS = [
    pytest.param("lora", "repadapter", PLACES["sliced"], id="lora-repadapter-sliced"),
    pytest.param("dora", "repadapter", PLACES["sliced"], id="dora-repadapter-sliced"),
    pytest.param("lora", "linear_probe", PLACES["plain"], id="lora-linear_probe-head"),
    pytest.param("ssf", "glora", PLACES["plain"], id="ssf-glora-head"),
    pytest.param("repadapter", "full", PLACES["plain"], id="repadapter-full-head"),
    pytest.param("ssf", "norm_tuning", PLACES["norm"], id="ssf-norm_tuning-norm"),
]


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reversed"])
@pytest.mark.parametrize(("one", "other", "where"), PAIRS)
def test_off_and_detached_in_any_order_bitwise(one: str, other: str, where: tuple[str, ...], reverse: bool) -> None:
    names = (other, one) if reverse else (one, other)
    alone: dict[str, Tensor] = {}
    for name in names:
        single = net()
        put(single, name, where)
        alone[name] = output(single)
    for leaving, staying in ((0, 1), (1, 0)):
        model = net()
        before = snapshot(model)
        pair = [put(model, name, where) for name in names]
        both = output(model)
        with pair[leaving].enabled(False):
            assert torch.equal(output(model), alone[names[staying]])
        assert torch.equal(output(model), both)
        pair[leaving].detach()
        assert torch.equal(output(model), alone[names[staying]])
        assert attachments(model) == [pair[staying]]
        pair[staying].detach()
        assert_same(before, snapshot(model), "both gone")


@pytest.mark.parametrize(("one", "other", "where"), PAIRS)
def test_merged_and_unmerged_equal_both_attached(one: str, other: str, where: tuple[str, ...]) -> None:
    """Also where the earlier one is merged while the later one is attached, and comes back beneath it."""
    model = net().double()
    first, second = put(model, one, where), put(model, other, where)
    both = output(model)
    first.merge()
    torch.testing.assert_close(output(model), both)
    first.unmerge()
    assert torch.equal(output(model), both)
    state = {key: tensor.clone() for key, tensor in second.state_dict().items()}
    second.detach()
    first.merge()
    second = put(model, other, where)
    second.load_state_dict(state)
    first.unmerge()
    assert torch.equal(output(model), both)
    assert torch.equal(output(copy.deepcopy(model)), both)


def test_lora_before_repadapter_on_slices_is_w_plus_ba_times_i_plus_r() -> None:
    """q = (W + B A)(x + U (D x + a) + c) + b, written out, in both orders."""
    model = net().double()
    slices = {"where": "attn.q"}
    lora = attach(model, "lora", rank=2, **slices)
    rep = attach(model, RepAdapter(bottleneck=2, up_groups=1, dropout=0.0), **slices)
    stir(lora), stir(rep)
    ((_, one),), ((_, two),) = lora.parts.values(), rep.parts.values()
    plain: Any = net().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    moved = x + (x @ two.down.T + two.down_bias) @ two.up.T + two.up_bias
    weight, bias = plain.qkv.weight[:6], plain.qkv.bias[:6]
    expected = moved @ (weight + one.up @ one.down).T + bias
    torch.testing.assert_close(model.qkv(x)[:, :6], expected)
    torch.testing.assert_close(model.qkv(x)[:, 6:], plain.qkv(x)[:, 6:])
    lora.detach()
    lora = attach(model, "lora", rank=2, **slices)
    stir(lora)
    ((_, one),) = lora.parts.values()
    torch.testing.assert_close(model.qkv(x)[:, :6], moved @ weight.T + bias + x @ (one.up @ one.down).T)


def test_a_linear_probe_replaces_a_head_with_a_lora() -> None:
    model = net().double()
    put(model, "lora", ("head",))
    probe = put(model, "linear_probe", PLACES["plain"])
    weight, bias = (p.detach() for p in probe.parameters())
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(model.head(x), x @ weight.T + bias)
    with probe.enabled(False):
        assert not torch.equal(model.head(x), net().double().head(x))


def test_sums_and_other_rows_stay_in_the_call() -> None:
    """A LoRA beside a later sum in the weight, or later slices of other rows, runs as if it were alone."""
    for other, where in (("repadapter", "attn.v"), ("lora", "attn.q")):
        model = net()
        lora = attach(model, "lora", where="attn.q")
        attach(model, other, where=where)
        assert not any(seam.in_weights() for seam in lora.seams)
    model = net()
    assert attach(model, "lora", where="attn.q").seams[0].layer_orders == ()


@pytest.mark.parametrize("place", PLACES)
def test_a_sum_does_not_depend_on_the_weight(place: str) -> None:
    tuned = [put(net().double(), name, PLACES[place]) for name in [*able(PLACES[place]), *DECOMPOSED]]
    for attachment in filter(None, tuned):
        for site, adapter in attachment.parts.values():
            if adapter.adds:
                shape = getattr(site, "weight_shape", None) or getattr(site, "shape", (6,))
                one, other = torch.randn(2, *shape, dtype=torch.float64)
                torch.testing.assert_close(adapter.weight(one) - one, adapter.weight(other) - other)


class Shouts(Adapter):
    """An output form without a weight form."""

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * y


class Shout(Method):
    name: ClassVar[str] = "shout"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
    default: ClassVar[tuple[str, ...]] = ("head",)

    def build(self, site: Any) -> Adapter:
        return Shouts()


def test_an_adapter_without_a_weight_form_is_rejected_beneath_a_later_weight() -> None:
    model = net()
    attach(model, Shout())
    before = snapshot(model)
    with pytest.raises(UnsupportedSite) as raised:
        attach(model, "full", where="head")
    assert raised.value.site == "head"
    assert_same(before, snapshot(model), "rejected")
    other = net()
    attach(other, "full", where="head")
    attach(other, Shout())
    torch.testing.assert_close(other.head(torch.ones(6)), 2 * net().head(torch.ones(6)))


def test_a_shift_of_a_layer_without_a_bias_is_rejected_beneath_a_later_weight() -> None:
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
    expected = dense(put(model, "lora", PLACES["sliced"]), put(model, "repadapter", PLACES["sliced"]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**ToyHost().sample(model)), expected)

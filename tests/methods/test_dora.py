"""DoRA's equation 5, W' = m·(W + s·B A)/‖W + s·B A‖ per output, against dense weights built row by row; and against peft."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.injection import toy
from tests.methods.layers import site_of, trained
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach, hosts
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.kronecker.loha import LoHa
from veneer.methods.reparameterized.kronecker.lokr import LoKr
from veneer.methods.reparameterized.low_rank.dora import DoRA, DoRAAdapter

LINEAR = WeightSite(name="l", role="mlp.in", path="0", d_out=5, d_in=7)


def conv_site(module: nn.Module) -> WeightSite:
    return WeightSite(
        name="c", role="conv", path="0", kind="conv", d_out=module.out_channels, d_in=module.in_channels,
        kernel=module.kernel_size, stride=module.stride, padding=module.padding, dilation=module.dilation, groups=module.groups,
    )  # fmt: skip


def entered(method: DoRA, base: nn.Module, site: WeightSite, trained: bool = True) -> DoRAAdapter:
    """An adapter in float64 attached to the base, with all of its parameters away from their initialization."""
    torch.manual_seed(0)
    adapter = method.build(site).double()
    if trained:
        with torch.no_grad():
            adapter.up.normal_()
            adapter.magnitude_delta.normal_(std=0.1)
    adapter.enter(nn.Sequential(base))
    return adapter


def decomposed(base: Tensor, adapter: DoRAAdapter, site: WeightSite, s: float) -> Tensor:
    """Equation 5, one output at a time: its direction is its row over the row's norm, its magnitude ‖w‖ + the trained delta."""
    rows = []
    per_group = site.d_out // site.groups
    for o in range(site.d_out):
        ranks = adapter.up.shape[1]
        first = o // per_group * ranks if len(adapter.down) > ranks else 0  # one A for all, where groups do not divide the rank
        row = base[o] + s * sum(adapter.up[o, r].reshape(()) * adapter.down[first + r] for r in range(ranks))
        m = base[o].pow(2).sum().sqrt() + adapter.magnitude_delta[o]
        rows.append(m * row / row.pow(2).sum().sqrt())
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("options", "s"), [({}, 1.0), ({"alpha": 6.0}, 2.0)])
def test_linear(options: dict, s: float, bias: bool) -> None:
    base = nn.Linear(7, 5, bias=bias).double()
    adapter = entered(DoRA(rank=3, **options), base, LINEAR)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    weight = decomposed(base.weight, adapter, LINEAR, s)
    torch.testing.assert_close(adapter.output(x, base(x)), F.linear(x, weight, base.bias))
    torch.testing.assert_close(adapter.weight(base.weight), weight)


@pytest.mark.parametrize(
    "base",
    [
        nn.Conv1d(4, 8, 3, padding=1),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 8, (3, 1), padding=(2, 0), dilation=(2, 1)),
        nn.Conv2d(4, 8, 3, padding="same", groups=2),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv3d(4, 4, 2, groups=2),
        nn.Conv2d(6, 6, 3, groups=6, stride=2),
        nn.Conv1d(6, 12, 3, groups=3, bias=False),
    ],
    ids=repr,
)
def test_convolutions_of_every_geometry(base: nn.Module) -> None:
    base, site = copy.deepcopy(base).double(), conv_site(base)
    adapter = entered(DoRA(rank=4, alpha=2.0), base, site)
    x = torch.randn(2, site.d_in, *(6, 7, 5)[: len(site.kernel)], dtype=torch.float64)
    weight = decomposed(base.weight, adapter, site, 0.5)
    expected = copy.deepcopy(base)
    expected.weight.data.copy_(weight)
    torch.testing.assert_close(adapter.output(x, base(x)), expected(x))
    torch.testing.assert_close(adapter.weight(base.weight), weight)


@pytest.mark.parametrize("base", [nn.Linear(7, 5), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6)], ids=repr)
def test_a_new_adapter_is_the_identity_bitwise_and_its_count_is_the_formula(base: nn.Module) -> None:
    site = LINEAR if isinstance(base, nn.Linear) else conv_site(base)
    method = DoRA(rank=4)
    adapter = method.build(site)
    adapter.enter(nn.Sequential(base))
    x = torch.randn(3, 7) if isinstance(base, nn.Linear) else torch.randn(2, site.d_in, 6, 6)
    assert torch.equal(adapter.output(x, base(x)), base(x))
    assert torch.equal(adapter.weight(base.weight), base.weight)
    assert adapter.down.abs().min() > 0
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())


METHODS = [DoRA(rank=4, norm_axis="input"), *(
    method(rank=2, alpha=3.0, norm_axis=axis) for method in (LoHa, LoKr) for axis in ("output", "input"))]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.norm_axis}")
@pytest.mark.parametrize("base", [nn.Linear(8, 6), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, groups=2)], ids=repr)
def test_the_norm_of_either_axis_around_any_change(method: Any, base: nn.Module) -> None:
    """m·V / ‖V‖, V = W + s·ΔW, channel by channel; nothing at the start, and the norm is a constant for the gradient."""
    site = site_of(base)
    adapter = method.build(site)
    assert torch.equal(adapter.weight(base.weight), base.weight)
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())
    adapter, weight = trained(method, site), base.weight.detach().double()
    v = (weight + adapter.delta().detach() * adapter.scaling).movedim(0 if method.norm_axis == "output" else 1, 0)
    start = weight.movedim(0 if method.norm_axis == "output" else 1, 0)
    want = torch.stack([
        (w.pow(2).sum().sqrt() + d) * row / row.pow(2).sum().sqrt()
        for w, row, d in zip(start, v, adapter.magnitude_delta.detach(), strict=True)
    ]).movedim(0, 0 if method.norm_axis == "output" else 1)  # fmt: skip
    got = adapter.weight(weight)
    torch.testing.assert_close(got.detach(), want)
    got.sum().backward()
    lengths = v.flatten(1).norm(dim=1)
    torch.testing.assert_close(adapter.magnitude_delta.grad, v.flatten(1).sum(1) / lengths)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapter.parameters())
    adapter.strength.fill_(0.5)
    torch.testing.assert_close(adapter.weight(weight).detach(), (want + weight) / 2)


@pytest.mark.parametrize("method", [DoRA, LoHa, LoKr])
def test_another_axis_is_rejected(method: Any) -> None:
    with raises(OptionError, method=method.name, option="norm_axis", given="both"):
        method(norm_axis="both")


def test_the_norm_is_a_constant_for_the_gradient() -> None:
    """Section 4.3: of m·V/C, with C = ‖V‖ held fixed, V gets m/C times the weight's gradient, m gets its part along V/C."""
    base = nn.Linear(7, 5).double()
    adapter = entered(DoRA(rank=3), base, LINEAR)
    x, target = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    (adapter.output(x, base(x)) * target).sum().backward()
    up, down = adapter.up.detach(), adapter.down.detach()
    V = base.weight.detach() + up @ down
    C = V.norm(dim=1, keepdim=True)
    m = base.weight.detach().norm(dim=1, keepdim=True) + adapter.magnitude_delta.detach()[:, None]
    of_weight = target.T @ x
    torch.testing.assert_close(adapter.up.grad, (m / C * of_weight) @ down.T)
    torch.testing.assert_close(adapter.down.grad, up.T @ (m / C * of_weight))
    torch.testing.assert_close(adapter.magnitude_delta.grad, (of_weight * V / C).sum(1))


def test_peft_gives_the_same_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 6, 1)).double()
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0", "3"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model.model.double()
    x = torch.randn(4, 7, dtype=torch.float64)
    for path in ("0", "3"):
        layer, module = theirs.get_submodule(path), base.get_submodule(path)
        site = WeightSite(name="l", role="l", path="0", d_out=5, d_in=7) if path == "0" else conv_site(module)
        adapter = entered(DoRA(rank=3, alpha=6), module, site, trained=False)
        m = layer.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            adapter.down.copy_(layer.lora_A["default"].weight)
            adapter.up.copy_(layer.lora_B["default"].weight)
            m.mul_(1.3)
            adapter.magnitude_delta.copy_(m.flatten() - module.weight.flatten(1).norm(dim=1))
        inputs = x if path == "0" else torch.randn(2, 5, 4, 4, dtype=torch.float64)
        pairs = [(adapter.down, layer.lora_A["default"].weight), (adapter.up, layer.lora_B["default"].weight)]
        ours, its = adapter.output(inputs, module(inputs)), layer(inputs)
        torch.testing.assert_close(ours, its)
        ours.sin().sum().backward()
        its.sin().sum().backward()
        for own, other in [*pairs, (adapter.magnitude_delta, m)]:
            torch.testing.assert_close(own.grad, other.grad.view_as(own))


def test_an_output_without_a_direction_is_trained_as_in_lora() -> None:
    base = nn.Linear(7, 5).double()
    nn.init.zeros_(base.weight)
    adapter = entered(DoRA(rank=3), base, LINEAR)
    x = torch.randn(2, 7, dtype=torch.float64)
    expected = (1 + adapter.magnitude_delta) * (x @ adapter.down.T @ adapter.up.T) + base.bias
    torch.testing.assert_close(adapter.output(x, base(x)), expected)
    adapter.output(x, base(x)).sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in adapter.parameters())


@pytest.fixture
def toy_host() -> Iterator[None]:
    hosts.register(toy.ToyHost)
    yield
    hosts.unregister(toy.ToyHost.name)


@pytest.mark.usefixtures("toy_host")
@pytest.mark.parametrize("below", ["lora", "bitfit", "dora"])
def test_what_acts_before_is_part_of_the_weight_that_is_decomposed(below: str) -> None:
    """Another attachment below, or its update added to the weights by hand: the same outputs."""
    where = {"lora": "attn.{q,v,out} conv head", "bitfit": "bias.{conv,head}", "dora": "attn.{q,out} conv"}[below]
    model, by_hand = toy.net().double(), toy.net().double()
    first = attach(model, below, where=where)
    toy.stir(first)
    second = attach(model, "dora", where="attn.{q,k,out} conv head")
    toy.stir(second)
    written = attach(by_hand, below, where=where)
    written.load_state_dict(first.state_dict())
    written.merge()
    weights = written.host_state_dict()
    weights = {k: t.clone() for k, t in weights.items()}
    written.unmerge()
    written.detach()
    by_hand.load_state_dict(weights)
    attach(by_hand, "dora", where="attn.{q,k,out} conv head").load_state_dict(second.state_dict())
    torch.testing.assert_close(toy.run(model), toy.run(by_hand))


def test_published_count_of_vit_b() -> None:
    """12 blocks of (768·8 + 2304·8 + 2304) on the fused qkv."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(vit, "dora", where="attn.qkv").report().trainable == 322_560


def test_rejections() -> None:
    with raises(OptionError, method="dora", option="rank", given=0):
        DoRA(rank=0)
    quantised = nn.Linear(7, 5)
    quantised.weight = nn.Parameter(torch.zeros(5, 7, dtype=torch.int8), requires_grad=False)
    with raises(UnsupportedSite, method="dora", site="l", given=torch.int8):
        DoRA(rank=3).build(LINEAR).enter(nn.Sequential(quantised))

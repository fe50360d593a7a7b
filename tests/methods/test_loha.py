"""LoHa's equation, W' = W + s·(B1 A1) ∘ (B2 A2), against a dense weight built from its definition."""

import pytest
import torch
from peft import LoHaConfig
from peft.tuners.loha.layer import Conv2d as PeftConv2d
from peft.tuners.loha.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F

from tests.hosts.published import build
from tests.methods.layers import conv_site, trained
from tests.raising import raises
from veneer.functional.hadamard import hadamard, hadamard_pair
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.kronecker.loha import LoHa, LoHaAdapter

SMALL = WeightSite(name="s", role="mlp.in", path="s", d_out=5, d_in=7)
WIDE = WeightSite(name="w", role="mlp.in", path="w", d_out=24, d_in=20)
GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": 2, "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "stride": 2, "groups": 2},
    {"kernel_size": 3, "padding": "same", "groups": 4},
]


def dense_change(adapter: LoHaAdapter, site: WeightSite) -> Tensor:
    """ΔW[o, i, k] = (Σ_p B1[o, p] A1[p, i, k]) · (Σ_p B2[o, p] A2[p, i, k]), one output at a time.

    In the Tucker form Σ_pq G[p, q, k] B[o, p] A[q, i] in each pair of brackets.
    """
    change = torch.ones(site.weight_shape, dtype=torch.float64)
    for up, down, core in ((adapter.up1, adapter.down1, adapter.core1), (adapter.up2, adapter.down2, adapter.core2)):
        for o in range(site.d_out):
            product = torch.zeros(site.weight_shape[1:], dtype=torch.float64)
            for p in range(up.shape[1]):
                if core is None:
                    product += up[o, p] * down[p]
                    continue
                for q in range(up.shape[1]):
                    outer = down[q].reshape(-1, *(1,) * len(site.kernel)) * core[p, q]
                    product += up[o, p] * outer
            change[o] *= product
    return change.detach()


@pytest.mark.parametrize(("site", "factored"), [(SMALL, False), (WIDE, True)])
@pytest.mark.parametrize(("alpha", "s"), [(None, 1.0), (1.5, 0.5)])
def test_linear(site: WeightSite, factored: bool, alpha: float | None, s: float) -> None:
    adapter = trained(LoHa(rank=3, alpha=alpha), site)
    assert adapter.factored == factored
    base = nn.Linear(site.d_in, site.d_out).double()
    x = torch.randn(2, 4, site.d_in, dtype=torch.float64)
    weight = base.weight + s * dense_change(adapter, site)
    torch.testing.assert_close(adapter.output(x, base(x)), F.linear(x, weight, base.bias))
    torch.testing.assert_close(adapter.weight(base.weight), weight)
    adapter.strength.fill_(0.25)
    weight = base.weight + 0.25 * s * dense_change(adapter, site)
    torch.testing.assert_close(adapter.output(x, base(x)), F.linear(x, weight, base.bias))
    torch.testing.assert_close(adapter.weight(base.weight), weight)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_of_every_geometry(geometry: dict, factored: bool, tucker: bool) -> None:
    base = nn.Conv2d(4, 8, **geometry).double()
    site = conv_site(base)
    adapter = trained(LoHa(rank=2, alpha=1.0, tucker=tucker), site)
    adapter.factored = factored
    assert (adapter.core1 is not None) == (tucker and geometry["kernel_size"] != 1)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    weight = base.weight + 0.5 * dense_change(adapter, site)
    expected = F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation, base.groups)
    torch.testing.assert_close(adapter.output(x, base(x)), expected)
    torch.testing.assert_close(adapter.weight(base.weight), weight)


@pytest.mark.parametrize("module", [nn.Conv1d(6, 12, 5, padding=2), nn.Conv3d(4, 4, (1, 2, 3), groups=4)])
def test_convolutions_in_one_and_three_dimensions(module: nn.Module) -> None:
    base = module.double()
    site = conv_site(base)
    for tucker in (False, True):
        adapter = trained(LoHa(rank=2, tucker=tucker), site)
        x = torch.randn(2, base.in_channels, *(6,) * len(site.kernel), dtype=torch.float64)
        plain = base(x)
        with torch.no_grad():
            base.weight.add_(dense_change(adapter, site))
        torch.testing.assert_close(adapter.output(x, plain), base(x))


@pytest.mark.parametrize("site", [SMALL, WIDE, conv_site(nn.Conv2d(4, 8, 3, groups=2)), conv_site(nn.Conv2d(6, 6, 3, groups=6))])
@pytest.mark.parametrize("tucker", [False, True])
def test_a_new_adapter_is_the_identity_and_its_count_is_the_formula(site: WeightSite, tucker: bool) -> None:
    method = LoHa(rank=4, tucker=tucker)
    adapter = method.build(site)
    weight = torch.randn(site.weight_shape)
    assert torch.equal(adapter.weight(weight), weight)
    assert [name for name, p in adapter.named_parameters() if not p.abs().max() > 0] == ["up2"]
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())


def test_published_counts() -> None:
    """SD 1.5's UNet at rank 4: 1,594,368 on the attention, twice LoRA's 797,184."""
    unet = build("sd15")
    assert attach(unet, "loha", rank=4).report().trainable == 1_594_368 == 2 * 797_184


def test_initialization_equals_lycoris() -> None:
    torch.manual_seed(0)
    adapter = LoHa(rank=64, tucker=True).build(conv_site(nn.Conv2d(64, 64, 3)))
    deviations = {name: p.std().item() for name, p in adapter.named_parameters()}
    expected = {"up1": 0.1, "down1": 1.0, "up2": 0.0, "down2": 1.0, "core1": 0.1, "core2": 0.1}
    assert deviations == pytest.approx(expected, rel=0.05)


def factors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_the_gradients_are_right_twice() -> None:
    given = factors((4, 2), (2, 3), (4, 2), (2, 3))
    assert torch.autograd.gradcheck(hadamard, given)
    assert torch.autograd.gradgradcheck(hadamard, given)


def test_the_backward_pass_keeps_no_product() -> None:
    """Neither of the two products (50, 40) is kept: only the four factors."""
    given, kept = factors((50, 2), (2, 40), (50, 2), (2, 40)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        hadamard(*given)
    assert kept == [t.shape for t in given]


def test_the_pair_of_rank_r_squared_is_the_same_matrix() -> None:
    given = factors((6, 3), (3, 5), (6, 3), (3, 5))
    up, down = hadamard_pair(*given)
    assert (up.shape, down.shape) == ((6, 9), (9, 5))
    torch.testing.assert_close(up @ down, (given[0] @ given[1]) * (given[2] @ given[3]))


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("module", [nn.Linear(7, 5), nn.Conv2d(4, 6, 3)])
def test_peft_computes_the_same_change(module: nn.Module, tucker: bool) -> None:
    linear = isinstance(module, nn.Linear)
    site = SMALL if linear else conv_site(module)
    adapter = trained(LoHa(rank=3, alpha=2.0, tucker=tucker), site)
    config = LoHaConfig(r=3, alpha=2.0, use_effective_conv2d=tucker)
    peft = (PeftLinear if linear else PeftConv2d)(module, "default", config, r=3, alpha=2.0).double()
    flip = (lambda t: t.T) if adapter.core1 is not None else (lambda t: t)
    with torch.no_grad():
        for i in (1, 2):
            getattr(peft, f"hada_w{i}_a")["default"].copy_(flip(getattr(adapter, f"up{i}")))
            getattr(peft, f"hada_w{i}_b")["default"].copy_(getattr(adapter, f"down{i}").flatten(1))
            if adapter.core1 is not None:
                getattr(peft, f"hada_t{i}")["default"].copy_(getattr(adapter, f"core{i}"))
        theirs = peft.get_delta_weight("default")
    torch.testing.assert_close(adapter.delta() * adapter.scaling, theirs)


def test_rank_out_of_range() -> None:
    with raises(OptionError, method="loha", option="rank", given=0):
        LoHa(rank=0)

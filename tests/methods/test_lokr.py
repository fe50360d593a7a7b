"""LoKr's equation, W' = W + s·(C ⊗ D), against a dense weight built from its definition."""

import pytest
import torch
from peft import LoKrConfig
from peft.tuners.lokr.layer import Conv2d as PeftConv2d
from peft.tuners.lokr.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F

from tests.hosts.published import build
from tests.methods.layers import conv_site, trained
from tests.raising import raises
from veneer.functional.kronecker import kron_apply, kron_factors, kron_weight
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.kronecker.lokr import LoKr, LoKrAdapter

LINEAR = WeightSite(name="l", role="mlp.in", path="l", d_out=24, d_in=12)
GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": 2, "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "stride": 2, "groups": 2},
    {"kernel_size": 3, "padding": "same", "groups": 8},
]
FORMS = [{}, {"rank": 1, "alpha": 3.0}, {"rank": 1, "alpha": 3.0, "decompose_both": True}]


def dense_change(adapter: LoKrAdapter, site: WeightSite) -> Tensor:
    """ΔW[o, i, …] = C[o // vp, i // vq] · D[o mod vp, i mod vq, …], one element at a time."""
    c = adapter.left if adapter.left is not None else adapter.left_up @ adapter.left_down
    d = adapter.right
    if d is None:
        d = torch.einsum("vr,r...->v...", adapter.right_up, adapter.right_down)
    change = torch.zeros(site.weight_shape, dtype=torch.float64)
    for o in range(change.shape[0]):
        for i in range(change.shape[1]):
            change[o, i] = c[o // d.shape[0], i // d.shape[1]] * d[o % d.shape[0], i % d.shape[1]]
    return change.detach()


@pytest.mark.parametrize("factor", [-1, 2, 6, 12])
@pytest.mark.parametrize("form", FORMS)
def test_linear(factor: int, form: dict) -> None:
    adapter = trained(LoKr(factor=factor, **form), LINEAR)
    s = 3.0 if adapter.left is None or adapter.right is None else 1.0
    base = nn.Linear(12, 24).double()
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    for strength in (1.0, 0.25):
        adapter.strength.fill_(strength)
        weight = base.weight + strength * s * dense_change(adapter, LINEAR)
        torch.testing.assert_close(adapter.output(x, base(x)), F.linear(x, weight, base.bias))
        torch.testing.assert_close(adapter.weight(base.weight), weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_of_every_geometry(geometry: dict, form: dict) -> None:
    base = nn.Conv2d(8, 16, **geometry).double()
    site = conv_site(base)
    adapter = trained(LoKr(factor=-1, **form), site)
    s = 3.0 if adapter.left is None or adapter.right is None else 1.0
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    weight = base.weight + s * dense_change(adapter, site)
    expected = F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation, base.groups)
    torch.testing.assert_close(adapter.output(x, base(x)), expected)
    torch.testing.assert_close(adapter.weight(base.weight), weight)


@pytest.mark.parametrize("base", [nn.Conv1d(6, 12, 5, padding=2), nn.Conv3d(4, 8, (1, 2, 3)), nn.Conv3d(4, 4, 2, groups=4)])
def test_convolutions_in_one_and_three_dimensions(base: nn.Module) -> None:
    site, base = conv_site(base), base.double()
    adapter = trained(LoKr(factor=2), site)
    x = torch.randn(2, base.in_channels, *(6,) * len(site.kernel), dtype=torch.float64)
    plain = base(x)
    with torch.no_grad():
        base.weight.add_(dense_change(adapter, site))
    torch.testing.assert_close(adapter.output(x, plain), base(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("module", [None, nn.Conv2d(8, 16, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6)])
def test_a_new_adapter_is_the_identity_and_its_count_is_the_formula(form: dict, module: nn.Module | None) -> None:
    site = LINEAR if module is None else conv_site(module)
    method = LoKr(factor=-1, **form)
    adapter = method.build(site)
    weight = torch.randn(site.weight_shape)
    assert torch.equal(adapter.weight(weight), weight)
    zeros = [name for name, p in adapter.named_parameters() if not p.abs().max() > 0]
    assert zeros == ["right" if adapter.right is not None else "right_down"]
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())


def test_when_a_factor_is_of_low_rank() -> None:
    """24 by 12 splits into 4·6 and 3·4: D (6, 4) is full from rank 3 on, C (4, 3) from rank 2 on."""
    for rank, (left, right) in {1: (1, 1), 2: (None, 2), 3: (None, None)}.items():
        split = LoKr(factor=-1, rank=rank, decompose_both=True).split(LINEAR)
        assert (split.up, split.vp, split.uq, split.vq) == (4, 6, 3, 4)
        assert (split.left_rank, split.right_rank) == (left, right)
    assert LoKr(factor=-1, rank=3, alpha=9.0).build(LINEAR).scaling == 1  # both full: alpha does not count
    assert LoKr(factor=-1, rank=2, alpha=9.0).build(LINEAR).scaling == 4.5


def test_published_counts() -> None:
    """SD 1.5's attention: 106,496 at rank 4 near a square, 1,469,312 and 5,846,528 in full at factors 8 and 4."""
    unet = build("sd15")
    for options, count in (({"factor": -1, "rank": 4}, 106_496), ({"factor": 8}, 1_469_312), ({"factor": 4}, 5_846_528)):
        tuned = attach(unet, "lokr", **options)
        assert tuned.report().trainable == count
        tuned.detach()


def test_the_sides_of_the_factors() -> None:
    """The table in the LyCORIS library's own description, and widths of SD 1.5."""
    rows = {
        (128, -1): (8, 16), (128, 2): (2, 64), (128, 4): (4, 32), (128, 16): (8, 16), (128, 64): (2, 64), (250, -1): (10, 25),
        (250, 4): (2, 125), (250, 8): (5, 50), (360, -1): (18, 20), (360, 16): (15, 24), (127, 8): (1, 127),
        (320, -1): (16, 20), (640, -1): (20, 32), (768, -1): (24, 32), (1280, -1): (32, 40), (1, 8): (1, 1),
    }  # fmt: skip
    assert {key: kron_factors(*key) for key in rows} == rows


def test_the_sides_are_those_of_the_lycoris_library() -> None:
    general = pytest.importorskip("lycoris.functional.general", exc_type=ImportError)
    for width in range(1, 300):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 12, 16, 50):
            assert kron_factors(width, factor) == general.factorization(width, factor), (width, factor)


@pytest.mark.parametrize("p", [2, 5])
def test_the_product_is_applied_without_being_built(p: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(p, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    x = torch.randn(7, 6, dtype=torch.float64)
    for swapped in (False, True):
        product = kron_weight(left, right, swapped)
        for o in range(4 * p):
            u, v = (o % p, o // p) if swapped else (o // 4, o % 4)
            torch.testing.assert_close(product[o], torch.stack([left[u, i // 2] * right[v, i % 2] for i in range(6)]))
        got = kron_apply(x, left, lambda z: F.linear(z, right), swapped=swapped)
        torch.testing.assert_close(got, x @ product.T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("module", [nn.Linear(12, 24), nn.Conv2d(8, 16, 3)])
def test_peft_computes_the_same_change(module: nn.Module, form: dict) -> None:
    linear = isinstance(module, nn.Linear)
    site = LINEAR if linear else conv_site(module)
    options = {"rank": 100, "alpha": 100.0, **form}
    adapter = trained(LoKr(factor=-1, **options), site)
    r, alpha, both = options["rank"], options["alpha"], options.get("decompose_both", False)
    config = LoKrConfig(r=r, alpha=alpha, decompose_both=both, decompose_factor=-1)
    peft = (PeftLinear if linear else PeftConv2d)(module, "default", config, r=r, alpha=alpha).double()
    names = {"left": "w1", "left_up": "w1_a", "left_down": "w1_b", "right": "w2", "right_up": "w2_a", "right_down": "w2_b"}
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            theirs = getattr(peft, f"lokr_{names[name]}")["default"]
            theirs.copy_(p.reshape(theirs.shape))
        change = peft.get_delta_weight("default")
    torch.testing.assert_close(adapter.delta() * adapter.scaling, change)


@pytest.mark.parametrize("options", [{"factor": 0}, {"factor": -2}, {"rank": 0}, {"alpha": 1.0}, {"decompose_both": True}])
def test_options_out_of_range(options: dict) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="lokr", option=option, given=given):
        LoKr(**options)


@pytest.mark.parametrize("low", ["left", "right", "both", "none"])
@pytest.mark.parametrize("base", [nn.Linear(12, 24), nn.Conv2d(12, 24, 3, padding=1)], ids=["linear", "conv"])
def test_sides_and_ranks_outright(base: nn.Module, low: str) -> None:
    """A split that follows no factor, with ranks that the rules would not give."""
    base = base.double()
    site = conv_site(base) if isinstance(base, nn.Conv2d) else LINEAR
    adapter = trained(LoKr(rank=7, alpha=3.5, sides=(8, 2), low=low), site)
    shapes = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    left = {"left_up": (8, 7), "left_down": (7, 2)} if low in ("left", "both") else {"left": (8, 2)}
    kernel = tuple(site.kernel)
    right = {"right_up": (3, 7), "right_down": (7, 6, *kernel)} if low in ("right", "both") else {"right": (3, 6, *kernel)}
    assert shapes == left | right
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64) if kernel else torch.randn(3, 12, dtype=torch.float64)
    weight = base.weight + (1.0 if low == "none" else 0.5) * dense_change(adapter, site)
    torch.testing.assert_close(adapter.weight(base.weight), weight)
    want = F.conv2d(x, weight, base.bias, padding=1) if kernel else F.linear(x, weight, base.bias)
    torch.testing.assert_close(adapter.output(x, base(x)), want)


def test_sides_must_divide() -> None:
    with raises(OptionError, method="lokr", option="sides", given=(5, 2), expected=(24, 12)):
        LoKr(sides=(5, 2)).build(LINEAR)
    with raises(OptionError, method="lokr", option="low", given="left", expected="rank"):
        LoKr(low="left")
    with raises(OptionError, method="lokr", option="low", given="up"):
        LoKr(rank=1, low="up")

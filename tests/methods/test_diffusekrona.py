"""DiffuseKronA's product against its definition, in the order of the paper and in that of the authors' code."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.hosts.published import build
from tests.methods.layers import conv_site
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.kronecker.diffusekrona import DiffuseKronA, DiffuseKronAAdapter
from veneer.methods.reparameterized.kronecker.lokr import LoKr

LINEAR = WeightSite(name="l", role="attn.q", path="l", d_out=12, d_in=10)
GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": (3, 2), "stride": 2, "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": "same", "groups": 2},
]


def trained(method: DiffuseKronA, site: WeightSite) -> DiffuseKronAAdapter:
    """An adapter in float64 with both factors away from zero."""
    torch.manual_seed(0)
    adapter = method.build(site).double().eval()
    with torch.no_grad():
        adapter.right.normal_()
    return adapter


def dense_change(adapter: DiffuseKronAAdapter, site: WeightSite, permuted: bool) -> Tensor:
    """Row i·b1 + j (permuted: j·a1 + i), column k·b2 + l: A[i, k] · B[j, l, …], one element at a time."""
    a, b = adapter.left, adapter.right
    change = torch.zeros(site.weight_shape, dtype=torch.float64)
    for i in range(a.shape[0]):
        for j in range(b.shape[0]):
            for k in range(a.shape[1]):
                for m in range(b.shape[1]):
                    row = j * a.shape[0] + i if permuted else i * b.shape[0] + j
                    change[row, k * b.shape[1] + m] = a[i, k] * b[j, m]
    return change.detach()


def authors_output(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Output of the authors' three-dimensional branch for x (batch, tokens, d_in): rows of b2, transposed, times Aᵀ, then B."""
    (a1, a2), (b1, b2) = a.shape, b.shape
    rows = x.reshape(-1, a2, b2).transpose(1, 2)
    return torch.stack([b @ (row @ a.T) for row in rows]).reshape(*x.shape[:2], a1 * b1)


@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize(("a1", "a2"), [(4, 5), (2, 10), (12, 1), (3, 2)])
def test_linear(a1: int, a2: int, permuted: bool) -> None:
    adapter = trained(DiffuseKronA(a1=a1, a2=a2, permuted=permuted), LINEAR)
    base = nn.Linear(10, 12).double()
    x = torch.randn(2, 4, 10, dtype=torch.float64)
    for strength in (1.0, 0.25):
        adapter.strength.fill_(strength)
        weight = base.weight + strength * dense_change(adapter, LINEAR, permuted)
        torch.testing.assert_close(adapter.output(x, base(x)), F.linear(x, weight, base.bias))
        torch.testing.assert_close(adapter.weight(base.weight), weight)


def test_permuted_is_what_the_authors_compute() -> None:
    adapter = trained(DiffuseKronA(a1=4, a2=5), LINEAR)
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    expected = authors_output(x, adapter.left, adapter.right)
    torch.testing.assert_close(adapter.output(x, torch.zeros(2, 3, 12, dtype=torch.float64)), expected)
    plain = torch.kron(adapter.left, adapter.right)
    assert not torch.allclose(expected, x @ plain.T)
    turned = expected.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)  # (b1, a1) to (a1, b1)
    torch.testing.assert_close(turned, x @ plain.T)


@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_of_every_geometry(geometry: dict, permuted: bool) -> None:
    base = nn.Conv2d(8, 12, **geometry).double()
    site = conv_site(base)
    adapter = trained(DiffuseKronA(a1=3, a2=2, permuted=permuted), site)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    weight = base.weight + dense_change(adapter, site, permuted)
    expected = F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation, base.groups)
    torch.testing.assert_close(adapter.output(x, base(x)), expected)
    torch.testing.assert_close(adapter.weight(base.weight), weight)


def test_unpermuted_is_lokr_of_the_same_shapes() -> None:
    """12 = 3·4 and 10 = 2·5 near a square: C (3, 2) and D (4, 5)."""
    krona = trained(DiffuseKronA(a1=3, a2=2, permuted=False), LINEAR)
    lokr = LoKr(factor=-1).build(LINEAR).double()
    with torch.no_grad():
        lokr.left.copy_(krona.left)
        lokr.right.copy_(krona.right)
    torch.testing.assert_close(krona.delta(), lokr.delta())


@pytest.mark.parametrize("site", [LINEAR, conv_site(nn.Conv2d(8, 12, 3, groups=2))])
def test_a_new_adapter_is_the_identity_and_its_count_is_the_formula(site: WeightSite) -> None:
    method = DiffuseKronA(a1=4, a2=2)
    adapter = method.build(site)
    weight = torch.randn(site.weight_shape)
    assert torch.equal(adapter.weight(weight), weight)
    assert adapter.left.abs().min() > 0
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())


def test_counts_on_stable_diffusion() -> None:
    """64 × 8 at SD 1.5's 128 attention weights: 248,176, of which A is 512 each."""
    tuned = attach(build("sd15"), DiffuseKronA())
    sites = [site for site, _ in tuned.parts.values()]
    assert tuned.report().trainable == sum(512 + site.d_out // 64 * site.d_in // 8 for site in sites) == 248_176


def test_initialization_of_a() -> None:
    torch.manual_seed(0)
    site = WeightSite(name="l", role="attn.q", path="l", d_out=64, d_in=512)
    assert DiffuseKronA(a1=64, a2=512).build(site).left.std().item() == pytest.approx(1 / 64, rel=0.02)


@pytest.mark.parametrize("options", [{"a1": 0}, {"a2": 0}])
def test_options_out_of_range(options: dict) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="diffusekrona", option=option, given=given):
        DiffuseKronA(**options)


def test_shapes_that_do_not_fit() -> None:
    with raises(OptionError, method="diffusekrona", option="a1", given=64, expected=(1, 2, 3, 4, 6, 12)):
        DiffuseKronA().build(LINEAR)
    with raises(OptionError, method="diffusekrona", option="a2", given=2, expected=(1,)):
        DiffuseKronA(a1=4, a2=2).build(conv_site(nn.Conv2d(8, 8, 3, groups=8)))

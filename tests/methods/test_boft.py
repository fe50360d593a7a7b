"""BOFT's equation, W' = W Rᵀ with R a product of butterfly components, against dense matrices built from its definition."""

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from torch import Tensor, nn
from torch.nn import functional as F

from tests.hosts.published import build
from tests.methods.layers import conv_site, trained
from tests.raising import raises
from veneer.functional.cayley import skew
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.rotation.boft import BOFT
from veneer.methods.reparameterized.rotation.oft import OFT


def linear_site(d_out: int, d_in: int) -> WeightSite:
    return WeightSite(name="l", role="attn.q", path="l", d_out=d_out, d_in=d_in)


LINEAR = linear_site(5, 48)


def dense_rotation(entries: Tensor, b: int) -> Tensor:
    """R = B̃(d, 2^m) ⋯ B̃(d, 4) B̃(d, 2), with entries of half-blocks, h = b/2.

    B̃(d, k) is block-diagonal with factors of size k·h; a factor's quadrants are block-diagonal, so half-block p of
    its first half and half-block p of its second one make an orthogonal matrix of 2h = b.
    """
    m, d = len(entries), entries.shape[1] * b
    eye, rotation = torch.eye(b, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    for i in range(m):
        k = 2 ** (i + 1)
        component, block, size = torch.zeros(d, d, dtype=torch.float64), 0, k * b // 2
        for start in range(0, d, size):
            for p in range(k // 2):
                q = torch.zeros(b, b, dtype=torch.float64)
                q[torch.triu(torch.ones(b, b), 1).bool()] = entries[i, block]
                q = q - q.T
                step = max(1, b // 2)
                if k == 2:
                    places = list(range(start, start + b))
                else:
                    first = start + p * step
                    places = [*range(first, first + step), *range(first + size // 2, first + size // 2 + step)]
                component[torch.tensor(places)[:, None], torch.tensor(places)] = (eye + q) @ torch.linalg.inv(eye - q)
                block += 1
        rotation = component @ rotation
    return rotation.detach()


@pytest.mark.parametrize(("m", "b"), [(1, 3), (1, 48), (2, 8), (3, 4), (5, 2), (2, 12)])
@pytest.mark.parametrize("rescale", [False, True])
def test_linear(m: int, b: int, rescale: bool) -> None:
    site = linear_site(5, 32) if m == 5 else LINEAR
    adapter = trained(BOFT(m=m, b=b, rescale=rescale), site)
    base, x = nn.Linear(site.d_in, 5).double(), torch.randn(7, site.d_in, dtype=torch.float64)
    rotation = dense_rotation(adapter.skew, b)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(site.d_in, dtype=torch.float64))
    expected = (rotation @ base.weight.T).T @ x.T  # z = (R(m, b) W⁰)ᵀ x
    if rescale:
        expected = expected * adapter.magnitude[:, None]
    weight = adapter.weight(base.weight)
    torch.testing.assert_close(F.linear(x, weight), expected.T)
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.weight(base.weight), base.weight + 0.25 * (weight - base.weight))


def test_enough_components_make_it_dense() -> None:
    """BOFT(log2(2d/b), b): 32 numbers with b = 4 need 4; with 3 there are zeros."""
    eye = torch.eye(32, dtype=torch.float64)
    for m, dense in ((4, True), (3, False)):
        rotation = trained(BOFT(m=m, b=4), linear_site(32, 32)).weight(eye)
        assert bool((rotation.abs() > 0).all()) == dense


def test_one_component_is_oft() -> None:
    boft, oft = trained(BOFT(m=1, b=4), LINEAR), OFT(block_size=4).build(LINEAR).double()
    with torch.no_grad():
        oft.skew.copy_(boft.skew[0])
    weight = torch.randn(5, 48, dtype=torch.float64)
    torch.testing.assert_close(boft.weight(weight), oft.weight(weight))


@pytest.mark.parametrize(("m", "b"), [(1, 4), (2, 4), (4, 2), (3, 4)])
def test_peft_permutes_and_multiplies_the_same(m: int, b: int) -> None:
    """With peft's own permutations and Cayley transform, whose Q has the other sign. (Its layer needs a GPU for m above 1.)"""
    adapter = trained(BOFT(m=m, b=b), linear_site(48, 48))
    q, rotation = skew(adapter.skew, b).detach(), torch.eye(48, dtype=torch.float64)
    for i in range(m):
        order = BOFTLayer.block_butterfly_perm(None, 48, 48 // b // 2**i, b // 2, m - 1)
        permutation = BOFTLayer.perm2mat(None, order).double()
        blocks = BOFTLayer.cayley_batch(None, -q[i].float()).double()
        rotation = permutation @ torch.block_diag(*blocks) @ permutation.T @ rotation
    weight = torch.randn(48, 48, dtype=torch.float64)
    torch.testing.assert_close(adapter.weight(weight), (rotation @ weight.T).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("geometry", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "stride": 2}])
def test_convolutions_rotate_the_values_of_each_window(geometry: dict) -> None:
    base = nn.Conv2d(16, 6, **geometry).double()
    site = conv_site(base)
    adapter = trained(BOFT(m=3, b=4), site)
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    windows = F.unfold(x, base.kernel_size, base.dilation, base.padding, base.stride)
    expected = base.weight.flatten(1) @ (dense_rotation(adapter.skew, 4).T @ windows) + base.bias[:, None]
    got = F.conv2d(x, adapter.weight(base.weight), base.bias, base.stride, base.padding)
    torch.testing.assert_close(got.flatten(2), expected)


@pytest.mark.parametrize(("module", "m", "b"), [(nn.Conv2d(8, 6, 3, groups=2), 2, 6), (nn.Conv2d(4, 8, 4, groups=4), 3, 4)])
def test_grouped_and_depthwise_convolutions_rotate_each_kernel(module: nn.Module, m: int, b: int) -> None:
    weight = module.weight.detach().double()
    adapter = trained(BOFT(m=m, b=b), conv_site(module))
    rotation = dense_rotation(adapter.skew, b)
    expected = torch.stack([(rotation @ kernel.flatten()).reshape(kernel.shape) for kernel in weight])
    torch.testing.assert_close(adapter.weight(weight), expected)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("site", [LINEAR, conv_site(nn.Conv2d(16, 6, 3, groups=2))])
def test_a_new_adapter_is_the_identity_and_its_count_is_the_formula(rescale: bool, site: WeightSite) -> None:
    method = BOFT(m=3, b=2, rescale=rescale)
    for dtype in (torch.float32, torch.bfloat16):
        adapter = method.build(site).to(dtype)
        weight = torch.randn(site.weight_shape, dtype=dtype)
        assert torch.equal(adapter.weight(weight), weight)
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())


def test_published_counts() -> None:
    """The paper's tables with m = 2, b = 8 at every linear layer: 0.12 % of Llama-2-7B's 6.74 billion, 0.75 M on DeBERTaV3-base.

    The latter count includes two parameters per output that are not part of the rotations: with them all rows of tables 1 and 4
    are met, as 1.99, 1.77 and 1.11 M on DINOv2-large here. The rotations are ½ (b − 1) d m each (section 4).
    """
    llama = [linear_site(4096, 4096)] * 4 + [linear_site(11008, 4096)] * 2 + [linear_site(4096, 11008)]
    count = 32 * sum(BOFT().count(site) for site in llama)
    assert f"{count / 6_738_415_616:.2%}" == "0.12%"
    deberta = [linear_site(768, 768)] * 4 + [linear_site(3072, 768), linear_site(768, 3072)]
    dino = [linear_site(1024, 1024)] * 4 + [linear_site(4096, 1024), linear_site(1024, 4096)]
    rows = [(12, deberta, 2, 8, "0.75"), (24, dino, 2, 8, "1.99"), (24, dino, 4, 4, "1.77"), (24, dino, 6, 2, "1.11")]
    for layers, sites, m, b, millions in rows:
        count = layers * sum(BOFT(m=m, b=b).count(site) + 2 * site.d_out for site in sites)
        assert f"{count / 1e6:.2f}" == millions
    assert attach(build("sd15"), "boft").report().trainable == 7 * 99_456  # 99,456 is the sum of d, 2·(8 − 1)/2 = 7


@pytest.mark.parametrize("options", [{"m": 0}, {"b": 1}, {"m": 2, "b": 3}])
def test_options_out_of_range(options: dict) -> None:
    option, given = list(options.items())[-1]
    with raises(OptionError, method="boft", option=option, given=given):
        BOFT(**options)


def test_widths_that_do_not_split() -> None:
    with raises(OptionError, method="boft", option="m", given=16, expected=24):
        BOFT().build(linear_site(5, 24))
    with raises(OptionError, method="boft", option="m", given=16, expected=9):
        BOFT().build(conv_site(nn.Conv2d(8, 8, 3, groups=8)))

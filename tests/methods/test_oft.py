"""OFT's equation, W' = W Rᵀ with R = diag(R_1, …, R_r), against dense matrices built from its definition."""

import math

import pytest
import torch
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn
from torch.nn import functional as F

from tests.hosts.published import build
from tests.methods.layers import conv_site, trained
from tests.raising import raises
from veneer.functional.cayley import blocks_apply, cayley_change, clip_norm, neumann_change, skew
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.rotation.oft import OFT

LINEAR = WeightSite(name="l", role="attn.q", path="l", d_out=5, d_in=12)


def linear_site(d_out: int, d_in: int) -> WeightSite:
    return WeightSite(name="l", role="attn.q", path="l", d_out=d_out, d_in=d_in)


def dense_rotation(entries: Tensor, size: int, blocks: int, radius: float = math.inf) -> Tensor:
    """diag(R_1, …, R_r), R_i = (I + Q_i)(I − Q_i)⁻¹, entry by entry and with an explicit inverse; ‖Q_i‖ at most `radius`."""
    entries = entries.detach()
    rotation = torch.zeros(size * blocks, size * blocks, dtype=torch.float64)
    for n in range(blocks):
        q, position = torch.zeros(size, size, dtype=torch.float64), 0
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j] = entries[n % len(entries), position]
                q[j, i] = -q[i, j]
                position += 1
        norm = math.sqrt(sum(float(e) ** 2 for e in q.flatten()))
        q = q * min(1.0, radius / norm)
        eye = torch.eye(size, dtype=torch.float64)
        rotation[n * size : (n + 1) * size, n * size : (n + 1) * size] = (eye + q) @ torch.linalg.inv(eye - q)
    return rotation


@pytest.mark.parametrize(
    ("options", "blocks", "size"),
    [
        ({}, 4, 3),
        ({"blocks": 1}, 1, 12),
        ({"block_size": 2}, 6, 2),
        ({"blocks": 3, "share": True}, 3, 4),
        ({"blocks": 2, "rescale": True}, 2, 6),
    ],
)
def test_linear(options: dict, blocks: int, size: int) -> None:
    adapter = trained(OFT(**options), LINEAR)
    base = nn.Linear(12, 5).double()
    rotation = dense_rotation(adapter.skew, size, blocks)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(12, dtype=torch.float64))
    x = torch.randn(7, 12, dtype=torch.float64)
    lengths = torch.ones(5, dtype=torch.float64) if adapter.magnitude is None else adapter.magnitude
    w0 = base.weight.T  # the paper's W⁰, d × n, one neuron a column
    expected = ((rotation @ w0) @ torch.diag(lengths)).T @ x.T  # z = (R W⁰ D)ᵀ x
    weight = adapter.weight(base.weight)
    torch.testing.assert_close(F.linear(x, weight), expected.T)
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.weight(base.weight), base.weight + 0.25 * (weight - base.weight))


def test_angles_and_lengths_of_neurons_stay() -> None:
    adapter, weight = trained(OFT(), LINEAR), torch.randn(5, 12, dtype=torch.float64)
    turned = adapter.weight(weight)
    torch.testing.assert_close(turned @ turned.T, weight @ weight.T)
    assert (turned - weight).abs().max() > 0.1


@pytest.mark.parametrize(
    "geometry", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, {"kernel_size": (3, 2), "stride": 2, "dilation": (2, 1)}]
)
def test_convolutions_rotate_the_values_of_each_window(geometry: dict) -> None:
    """W' x = W (Rᵀ x) for each window x, which `unfold` orders channel by channel."""
    base = nn.Conv2d(4, 6, **geometry).double()
    site = conv_site(base)
    blocks = 2 if site.kernel == (1, 1) else 4  # 4: each channel by itself
    adapter = trained(OFT(blocks=blocks), site)
    rotation = dense_rotation(adapter.skew, 4 * math.prod(site.kernel) // blocks, blocks)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    windows = F.unfold(x, base.kernel_size, base.dilation, base.padding, base.stride)
    expected = base.weight.flatten(1) @ (rotation.T @ windows) + base.bias[:, None]
    got = F.conv2d(x, adapter.weight(base.weight), base.bias, base.stride, base.padding, base.dilation)
    torch.testing.assert_close(got.flatten(2), expected)


@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 8, 3, groups=4), nn.Conv1d(4, 4, 9, groups=4)])
def test_grouped_and_depthwise_convolutions_rotate_each_kernel(module: nn.Module) -> None:
    site, weight = conv_site(module), module.weight.detach().double()
    adapter = trained(OFT(block_size=3), site)
    rotation = dense_rotation(adapter.skew, 3, weight[0].numel() // 3)
    expected = torch.stack([(rotation @ kernel.flatten()).reshape(kernel.shape) for kernel in weight])
    torch.testing.assert_close(adapter.weight(weight), expected)


@pytest.mark.parametrize("share", [False, True])
def test_coft_keeps_each_block_near(share: bool) -> None:
    """‖Q_i‖ ≤ ε·b²/√r: scaled down where it is larger, unchanged elsewhere."""
    method = OFT(blocks=3, coft=0.02, share=share)
    adapter = trained(method, LINEAR)
    radius = 0.02 * 4**2 / math.sqrt(1 if share else 3)
    with torch.no_grad():
        adapter.skew[0] *= 0.5 * radius / (math.sqrt(2) * adapter.skew[0].norm())
    if not share:
        assert skew(adapter.skew, 4).norm(dim=(1, 2))[1:].min() > radius
    weight = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(adapter.weight(weight), weight @ dense_rotation(adapter.skew, 4, 3, radius).T)
    free = trained(OFT(blocks=3, share=share), LINEAR)
    assert not torch.allclose(free.weight(weight), adapter.weight(weight))


def test_coft_has_a_gradient_at_the_start() -> None:
    adapter = OFT(coft=1e-4).build(LINEAR)
    (adapter.weight(torch.randn(5, 12)) * torch.randn(5, 12)).sum().backward()
    assert torch.isfinite(adapter.skew.grad).all()
    assert adapter.skew.grad.abs().max() > 0


@pytest.mark.parametrize("coft", [None, 0.01])
def test_peft_computes_the_same_rotation(coft: float | None) -> None:
    """peft's R is (I − Q)(I + Q)⁻¹, so its Q has the opposite sign; its eps has no b²."""
    adapter = trained(OFT(blocks=3, coft=coft), LINEAR)
    theirs = OFTRotationModule(3, 6, 4, 12, coft=coft is not None, eps=(coft or 0) * 4**2, use_cayley_neumann=False).double()
    with torch.no_grad():
        theirs.weight.copy_(-adapter.skew)
        x = torch.randn(7, 12, dtype=torch.float64)
        weight = torch.randn(5, 12, dtype=torch.float64)
        expected = F.linear(theirs(x), weight)
    torch.testing.assert_close(F.linear(x, adapter.weight(weight)), expected)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("options", [{}, {"share": True}, {"coft": 0.01}, {"rescale": True}])
def test_peft_computes_the_same_truncated_series(options: dict, terms: int) -> None:
    """peft's series is in its Q, with the same sign as ours."""
    adapter = trained(OFT(blocks=3, neumann_terms=terms, **options), LINEAR)
    coft = options.get("coft")
    kwargs = {"coft": coft is not None, "eps": (coft or 0) * 4**2, "block_share": options.get("share", False)}
    theirs = OFTRotationModule(len(adapter.skew), 6, 4, 12, num_cayley_neumann_terms=terms, **kwargs).double()
    with torch.no_grad():
        theirs.weight.copy_(adapter.skew)
        x = torch.randn(7, 12, dtype=torch.float64)
        weight = torch.randn(5, 12, dtype=torch.float64)
        lengths = 1 if adapter.magnitude is None else adapter.magnitude
        expected = F.linear(theirs(x), weight) * lengths
    torch.testing.assert_close(F.linear(x, adapter.weight(weight)), expected)
    if not options:
        torch.testing.assert_close(F.linear(adapter.input(x), weight), expected)


def test_the_truncated_series_is_zero_at_zero_and_right_in_its_gradient() -> None:
    assert torch.equal(neumann_change(torch.zeros(2, 4, 4), 5), torch.zeros(2, 4, 4))
    entries = 0.3 * torch.randn(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda e: neumann_change(skew(e, 3), 5), entries.requires_grad_())
    q = skew(0.1 * torch.randn(2, 3, dtype=torch.float64), 3)
    torch.testing.assert_close(neumann_change(q, 60), cayley_change(q))


@pytest.mark.parametrize("options", [{}, {"block_size": 3, "share": True}, {"coft": 0.1, "rescale": True}, {"neumann_terms": 5}])
@pytest.mark.parametrize("site", [LINEAR, conv_site(nn.Conv2d(8, 6, 3, groups=2))])
def test_a_new_adapter_is_the_identity_and_its_count_is_the_formula(options: dict, site: WeightSite) -> None:
    method = OFT(**options)
    for dtype in (torch.float32, torch.bfloat16):
        adapter = method.build(site).to(dtype)
        weight = torch.randn(site.weight_shape, dtype=dtype)
        assert torch.equal(adapter.weight(weight), weight)
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())


def test_published_counts() -> None:
    """Section 3.3: 128 × 128 in 8 blocks has 960. BOFT's table 2: blocks of 16 are 0.13 % of Llama-2-7B's 6.74 billion.

    SD 1.5's attention in 4 blocks: half of the 23,304,192 − 99,456 entries that are off the diagonal of the authors' matrices.
    """
    assert OFT(blocks=8).count(linear_site(128, 128)) == 960
    llama = [linear_site(4096, 4096)] * 4 + [linear_site(11008, 4096)] * 2 + [linear_site(4096, 11008)]
    count = 32 * sum(OFT(block_size=16).count(site) for site in llama)
    assert f"{count / 6_738_415_616:.2%}" == "0.13%"
    unet = build("sd15")
    for options, expected in (({}, 11_602_368), ({"block_size": 8}, 348_096), ({"block_size": 32}, 1_541_568)):
        tuned = attach(unet, "oft", **options)
        assert tuned.report().trainable == expected
        tuned.detach()


def test_the_transform_is_exact_also_far_from_the_start_and_right_in_its_gradient() -> None:
    torch.manual_seed(0)
    q = skew(10 * torch.randn(3, 28), 8)
    rotation = torch.eye(8) + cayley_change(q)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(8).expand(3, 8, 8), atol=2e-5, rtol=0)
    assert torch.equal(cayley_change(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))
    tiny = skew(torch.full((1, 6), 1e-9), 4)
    torch.testing.assert_close(cayley_change(tiny), 2 * tiny, atol=1e-15, rtol=1e-6)  # in R itself it would be lost beside the 1s
    entries = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: cayley_change(clip_norm(skew(e, 3), 0.5)), entries)


def test_a_block_diagonal_product() -> None:
    x, blocks = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(blocks_apply(x, blocks), x @ torch.block_diag(*blocks).T)


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": 0},
        {"block_size": 1},
        {"coft": 0.0},
        {"neumann_terms": 0},
        {"neumann_terms": 5, "side": "output"},
    ],
)
def test_options_out_of_range(options: dict) -> None:
    option, given = next(iter(options.items()))
    if option == "neumann_terms":
        given = (given, options.get("side", "input"))
    with raises(OptionError, method="oft", option=option, given=given):
        OFT(**options)


def test_widths_that_do_not_split() -> None:
    depthwise = conv_site(nn.Conv2d(8, 8, 3, groups=8))
    with raises(OptionError, method="oft", option="blocks", given=4, expected=(3, 9)):
        OFT().build(depthwise)
    with raises(OptionError, method="oft", option="block_size", given=8, expected=(2, 3, 4, 6, 12)):
        OFT(block_size=8).build(LINEAR)
    with raises(OptionError, method="oft", option="blocks", given=12, expected=(2, 3, 4, 6, 12)):
        OFT(blocks=12).build(LINEAR)

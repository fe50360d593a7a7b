"""LoRA's equation, W' = W + s·B A, against a dense weight built from its definition."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.raising import raises
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank._low_rank import LoRAAdapter
from veneer.methods.reparameterized.low_rank.lora import LoRA

LINEAR = WeightSite(name="l", role="mlp.in", path="l", d_out=5, d_in=7)
TABLE = WeightSite(name="t", role="embed.token", path="t", kind="embedding", d_out=4, d_in=9)


def conv_site(module: nn.Conv2d) -> WeightSite:
    return WeightSite(
        name="c", role="conv", path="c", kind="conv", d_out=module.out_channels, d_in=module.in_channels,
        kernel=module.kernel_size, stride=module.stride, padding=module.padding, dilation=module.dilation, groups=module.groups,
    )  # fmt: skip


def trained(method: LoRA, site: WeightSite) -> LoRAAdapter:
    """An adapter in float64 with both factors away from zero."""
    torch.manual_seed(0)
    adapter = method.build(site).double().eval()
    with torch.no_grad():
        adapter.up.normal_()
    return adapter


def dense_change(adapter: LoRAAdapter, site: WeightSite) -> Tensor:
    """ΔW[o, i, …] = Σ_r B[o, r] A[r, i, …], one element at a time; over the pairs of o's group, if groups have some."""
    change = torch.zeros(site.weight_shape, dtype=torch.float64)
    for o in range(site.d_out):
        for r in range(adapter.up.shape[1]):
            group = o // (site.d_out // site.groups) if len(adapter.down) > adapter.up.shape[1] else 0
            change[o] += adapter.up[o, r].reshape(()) * adapter.down[group * adapter.up.shape[1] + r]
    return change.detach()


@pytest.mark.parametrize(("options", "s"), [({}, 1.0), ({"alpha": 6.0}, 2.0), ({"alpha": 6.0, "rslora": True}, 6 / math.sqrt(3))])
def test_linear(options: dict, s: float) -> None:
    adapter = trained(LoRA(rank=3, **options), LINEAR)
    base = nn.Linear(7, 5).double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    weight = base.weight + s * dense_change(adapter, LINEAR)
    torch.testing.assert_close(adapter.output(x, base(x)), F.linear(x, weight, base.bias))
    torch.testing.assert_close(adapter.weight(base.weight), weight)


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 1), "padding": (2, 0), "dilation": (2, 1)},
        {"kernel_size": 3, "stride": 2, "groups": 2},
        {"kernel_size": 3, "padding": "same", "groups": 4},
    ],
)
def test_convolutions_of_every_geometry(geometry: dict) -> None:
    base = nn.Conv2d(4, 8, **geometry).double()
    site = conv_site(base)
    adapter = trained(LoRA(rank=4, alpha=2.0), site)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    weight = base.weight + 0.5 * dense_change(adapter, site)
    expected = F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation, base.groups)
    torch.testing.assert_close(adapter.output(x, base(x)), expected)
    torch.testing.assert_close(adapter.weight(base.weight), weight)


def test_embedding_rows_by_id() -> None:
    adapter = trained(LoRA(rank=2, alpha=1.0), TABLE)
    table = nn.Embedding(9, 4).double()
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    weight = table.weight.clone()
    for i in range(9):
        for o in range(4):
            weight[i, o] += 0.5 * sum(adapter.down[i, r] * adapter.up[o, r] for r in range(2))
    torch.testing.assert_close(adapter.output(ids, table(ids)), F.embedding(ids, weight))
    torch.testing.assert_close(adapter.weight(table.weight), weight)


@pytest.mark.parametrize("site", [LINEAR, TABLE, conv_site(nn.Conv2d(4, 8, 3, groups=2))])
def test_a_new_adapter_is_the_identity_and_its_count_is_the_formula(site: WeightSite) -> None:
    method = LoRA(rank=4)
    adapter = method.build(site)
    weight = torch.randn(site.weight_shape)
    assert torch.equal(adapter.weight(weight), weight)
    assert adapter.down.abs().min() > 0
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())


def test_dropout_acts_on_the_input_in_training_only() -> None:
    adapter = trained(LoRA(rank=3, dropout=0.5), LINEAR)
    x, y = torch.randn(64, 7, dtype=torch.float64), torch.zeros(64, 5, dtype=torch.float64)
    assert torch.equal(adapter.output(x, y), adapter.output(x, y))
    adapter.train()
    torch.manual_seed(1)
    got = adapter.output(x, y)
    torch.manual_seed(1)
    mask = F.dropout(torch.ones_like(x), 0.5)  # 0 or 2
    torch.testing.assert_close(got, (mask * x) @ adapter.down.T @ adapter.up.T)
    assert set(mask.unique().tolist()) == {0.0, 2.0}


def test_ranks_and_alphas_by_role_and_by_name() -> None:
    by_site = {"mlp": {"rank": 2}, "mlp.out": {"rank": 3, "alpha": 6.0}, "name:special": {"rank": 5, "alpha": 10.0}}
    method = LoRA(rank=8, alpha=4.0, by_site=by_site)
    rows = {("attn.q", "a"): (8, 4.0, 0.5), ("mlp.in", "a"): (2, 4.0, 2.0), ("mlp.out", "a"): (3, 6.0, 2.0)}
    rows[("mlp.out", "special")] = (5, 10.0, 2.0)
    for (role, name), (rank, alpha, s) in rows.items():
        site = WeightSite(name=name, role=role, path="l", d_out=5, d_in=7)
        here = method.at(site)
        assert isinstance(here, LoRA)
        assert (here.rank, here.alpha, here.scaling) == (rank, alpha, s)
        built = here.build(site)
        assert (built.down.shape[0], built.scaling) == (rank, s)
    assert (LoRA(rank=8).scaling, LoRA(rank=8, alpha=0.0).scaling) == (1, 0)


def test_options_of_revision_1_are_converted() -> None:
    former = {"rank": 8, "alpha": 0, "ranks": {"mlp": 2, "name:x": 5}, "alphas": {"name:x": 10.0}, "rslora": False}
    assert LoRA.from_config(LoRA.migrate(former, 1, ())) == LoRA(
        rank=8, by_site={"mlp": {"rank": 2}, "name:x": {"rank": 5, "alpha": 10.0}}
    )
    former = {"rank": 8, "ranks": {"mlp.*": 4}, "alphas": {"*": 8.0, "mlp.*": 2.0}, "by_site": {"name:x": {"alpha": 0}}}
    method = LoRA.from_config(LoRA.migrate(former, 1, ()))
    at = [
        method.at(WeightSite(name=n, role=r, path="l", d_out=5, d_in=7))
        for n, r in (("a", "mlp.in"), ("b", "attn.q"), ("x", "conv"))
    ]
    assert [(here.rank, here.alpha) for here in at] == [(4, 2.0), (8, 8.0), (8, None)], "the last matching pattern of each option"
    for option in ("ranks", "alphas", "by_site"):
        with raises(OptionError, option=option, given=3):
            LoRA.migrate({option: 3}, 1, ())


def test_initialization_of_a() -> None:
    site = WeightSite(name="l", role="mlp.in", path="l", d_out=4, d_in=400)
    torch.manual_seed(0)
    kaiming = LoRA(rank=64).build(site).down
    assert kaiming.abs().max() <= 1 / math.sqrt(400)  # a = √5 gives U(−1/√d_in, 1/√d_in)
    assert kaiming.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert LoRA(rank=64, init="gaussian").build(site).down.std().item() == pytest.approx(1 / 64, rel=0.02)


def test_lora_plus_gives_b_its_own_rate() -> None:
    parts = [(s, LoRA(rank=2).build(s)) for s in (LINEAR, TABLE)]
    down, up = LoRA(rank=2, up_ratio=16).groups(parts)
    assert (down["lr_scale"], up["lr_scale"]) == (1.0, 16)
    assert [p is a.down for p, (_, a) in zip(down["params"], parts, strict=True)] == [True, True]
    assert [p is a.up for p, (_, a) in zip(up["params"], parts, strict=True)] == [True, True]
    assert len(LoRA(rank=2).groups(parts)) == 1


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}, {"init": "zeros"}])
def test_options_out_of_range(options: dict) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="lora", option=option, given=given):
        LoRA(**options)


GROUPED = [
    nn.Conv2d(6, 6, 3, padding=1, groups=6),
    nn.Conv2d(6, 12, 3, stride=2, groups=6, bias=False),
    nn.Conv2d(6, 9, (3, 1), dilation=(2, 1), groups=3),
]


@pytest.mark.parametrize("base", GROUPED, ids=["depthwise", "strided", "grouped"])
@pytest.mark.parametrize("options", [{}, {"tucker": True}, {"init": "pissa"}], ids=["plain", "tucker", "pissa"])
def test_groups_that_do_not_divide_the_rank_have_the_same_a(base: nn.Conv2d, options: dict) -> None:
    """B A is a product of rank 2 in the flattened weight, here of the adapter's tensors, and the output equals the merged one."""
    base, site = copy.deepcopy(base).double(), conv_site(base)
    method = LoRA(rank=2, alpha=3.0, **options)
    adapter = trained(method, site)
    assert adapter.up.shape[:2] == (site.d_out, 2)
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())
    down = adapter.down.flatten(1)
    if "tucker" in options:
        down = torch.einsum("pq...,qi->pi...", adapter.core, down).flatten(1)
    change = (adapter.up.flatten(1) @ down).view(site.weight_shape)
    if options.get("init") == "pissa":
        holder = nn.Module()
        holder.c = base
        adapter.enter(holder)
        u, s, v = torch.linalg.svd(base.weight.detach().flatten(1), full_matrices=False)
        torch.testing.assert_close(1.5 * adapter.delta().abs().max(), torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(
            1.5 * (adapter.up0.flatten(1) @ adapter.down0.flatten(1)), u[:, :2] @ torch.diag(s[:2]) @ v[:2]
        )
        with torch.no_grad():
            adapter.up.normal_()
        change = (adapter.up.flatten(1) @ adapter.down.flatten(1) - adapter.up0.flatten(1) @ adapter.down0.flatten(1)).view(
            site.weight_shape
        )
    weight = base.weight + 1.5 * change
    x = torch.randn(2, 6, 8, 9, dtype=torch.float64)
    expected = F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation, base.groups)
    torch.testing.assert_close(adapter.output(x, base(x)), expected)
    torch.testing.assert_close(adapter.weight(base.weight), weight)


@pytest.mark.parametrize("options", [{}, {"tucker": True}, {"init": "olora"}])
def test_an_a_of_all_groups_is_a_lora_with_a_copy_a_group(options: dict) -> None:
    base = nn.Conv2d(6, 12, 3, groups=6)
    site = conv_site(base)
    shared = trained(LoRA(rank=2, alpha=3.0, **options), site)
    down, up = shared.pair()
    rank = 6 * up.shape[1]
    ordinary = LoRA(rank=rank, alpha=1.5 * rank).build(site).double()
    with torch.no_grad():
        ordinary.down.copy_(down)
        ordinary.up.copy_(up)
    torch.testing.assert_close(ordinary.delta(), shared.delta())
    torch.testing.assert_close(dense_change(ordinary, site), shared.delta())
    left, right = shared.factors()
    torch.testing.assert_close((left @ right).reshape(site.weight_shape), 1.5 * shared.delta())


def test_a_swap_keeps_an_a_of_all_groups_or_says_what_holds_it() -> None:
    site = conv_site(nn.Conv2d(6, 12, 3, groups=6))
    source = trained(LoRA(rank=2), site)
    wider = trained(LoRA(rank=4), site)
    wider.load_state_dict(wider.state_from(source))
    torch.testing.assert_close(wider.delta() * wider.scaling, source.delta() * source.scaling)
    grouped = trained(LoRA(rank=12), site)
    grouped.load_state_dict(grouped.state_from(source))
    torch.testing.assert_close(grouped.delta() * grouped.scaling, source.delta() * source.scaling)
    with raises(OptionError, option="rank", given=1, expected=6):
        wider.state_from(grouped)
    with raises(OptionError, option="rank", given=6, expected=12):
        trained(LoRA(rank=6), site).state_from(source)


def test_a_part_of_the_weight_needs_its_rank() -> None:
    with raises(OptionError, method="lora", option="rank", given=10, expected=9):
        LoRA(rank=10, init="pissa").build(conv_site(nn.Conv2d(24, 24, 3, groups=24)))

"""LoRA initialized from W, against the papers' form on W − s·B0 A0 and against peft; and LoRA with a Tucker core."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from tests.hosts.published import build
from tests.methods.layers import site_of
from tests.raising import raises
from veneer.functional.convolve import convolve
from veneer.injection import LoadError, UnsupportedSite, attach, hosts
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank._low_rank import TuckerAdapter, WeightInitAdapter
from veneer.methods.reparameterized.low_rank.lora import LoRA
from veneer.testing import parametrize_with_checks

TABLE = WeightSite(name="t", role="embed.token", path="0", kind="embedding", d_out=6, d_in=9)
LAYERS = [nn.Linear(7, 6), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 8, (3, 1), groups=2, dilation=2)]
INPUTS = [(3, 5, 7), (2, 4, 7, 6), (2, 4, 7, 6)]


def entered(base: Any, site: WeightSite, **options: Any) -> WeightInitAdapter:
    torch.manual_seed(0)
    adapter = LoRA(**options).build(site).to(base.weight.dtype)
    adapter.enter(nn.Sequential(base))
    return adapter


def moved(adapter: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return adapter


def pair_product(down: Tensor, up: Tensor, site: WeightSite) -> Tensor:
    """Σ_r up[:, r] down[r], one component at a time, each within its group."""
    if site.kind == "embedding":
        return sum(torch.outer(down[:, r], up[:, r]) for r in range(up.shape[1]))
    change = torch.zeros(site.weight_shape, dtype=up.dtype)
    height, rank = site.d_out // site.groups, up.shape[1]
    for group in range(site.groups):
        for r in range(rank):
            column = up[group * height : (group + 1) * height, r].reshape(height, *[1] * (down.ndim - 1))
            change[group * height : (group + 1) * height] += column * down[group * rank + r]
    return change


# the start


@pytest.mark.parametrize("scale", [{}, {"alpha": 7.0}, {"alpha": 3.0, "rslora": True}])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_is_that_of_peft(init: str, scale: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    base = nn.Linear(12, 9)
    adapter = entered(base, site_of(base), rank=4, init=init, **scale)
    options = {"lora_alpha": scale.get("alpha", 4), "use_rslora": scale.get("rslora", False)}
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=init, **options)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    torch.testing.assert_close(adapter.down, theirs.lora_A["default"].weight)
    torch.testing.assert_close(adapter.up, theirs.lora_B["default"].weight)
    left = base.weight - adapter.scaling * adapter.up0 @ adapter.down0
    torch.testing.assert_close(left, theirs.get_base_layer().weight, rtol=1e-4, atol=1e-5)


def test_pissa_is_the_best_approximation_of_each_group() -> None:
    base = nn.Conv2d(4, 8, 3, groups=2).double()
    adapter = entered(base, site_of(base), rank=4, init="pissa", alpha=10.0)
    got = adapter.scaling * pair_product(adapter.down0, adapter.up0, adapter.site)
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        U, S, Vh = torch.linalg.svd(base.weight[rows].detach().flatten(1), full_matrices=False)
        torch.testing.assert_close(got[rows].flatten(1), U[:, :2] * S[:2] @ Vh[:2])


def test_olora_is_a_projection_on_the_span_of_the_first_columns() -> None:
    base = nn.Linear(7, 6).double()
    adapter = entered(base, site_of(base), rank=3, init="olora", alpha=1.5)
    torch.testing.assert_close(adapter.up.T @ adapter.up, torch.eye(3, dtype=torch.float64))
    first = base.weight.detach()[:, :3]
    projection = first @ torch.linalg.solve(first.T @ first, first.T)
    torch.testing.assert_close((adapter.up @ adapter.down).detach(), projection @ base.weight.detach())


def test_the_randomized_decomposition_comes_near_the_exact_one() -> None:
    torch.manual_seed(0)
    base = nn.Linear(60, 50).double()
    U, _, Vh = torch.linalg.svd(torch.randn(50, 60, dtype=torch.float64), full_matrices=False)
    base.weight.data = U * 0.95 ** torch.arange(50) @ Vh
    exact = entered(base, site_of(base), rank=6, init="pissa")
    quick = entered(base, site_of(base), rank=6, init="pissa", pissa_niter=1)
    best = (base.weight - exact.up @ exact.down).norm()
    assert best < (base.weight - quick.up @ quick.down).norm() < 1.05 * best


# the same training as on W − s·B0 A0


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(("base", "shape"), list(zip(LAYERS, INPUTS, strict=True)), ids=repr)
def test_gradients_and_steps_are_those_of_the_papers(base: Any, shape: tuple[int, ...], init: str) -> None:
    """The paper's form, dense: a frozen W − s·B0 A0 with s·B A added, trained by SGD."""
    torch.manual_seed(0)
    base, site = copy.deepcopy(base).double(), site_of(base)
    adapter = entered(base, site, rank=4, init=init, alpha=6.0)
    s, (down, up) = 1.5, (t.detach().clone().requires_grad_() for t in (adapter.down, adapter.up))
    left = base.weight.detach() - s * pair_product(down.detach(), up.detach(), site)
    geometry = (site.stride, site.padding, site.dilation, site.groups)
    for _ in range(4):
        x = torch.randn(shape, dtype=torch.float64)
        y = base(x).detach()
        target = torch.randn_like(y)
        theirs = convolve(x, left + s * pair_product(down, up, site), *geometry)
        bias = base.bias.detach() if site.kind == "linear" else base.bias.detach().view(-1, 1, 1)
        expected = torch.autograd.grad(F.mse_loss(theirs + bias, target), (down, up))
        got = torch.autograd.grad(F.mse_loss(adapter.output(x, y), target), (adapter.down, adapter.up))
        torch.testing.assert_close(got, expected)
        with torch.no_grad():
            for mine, g, their, h in zip((adapter.down, adapter.up), got, (down, up), expected, strict=True):
                mine.sub_(g)
                their.sub_(h)
    assert (adapter.up - adapter.up0).abs().max() > 1e-3
    torch.testing.assert_close(adapter.weight(base.weight), left + s * pair_product(down, up, site))


def test_dropout_is_before_a_only() -> None:
    base = nn.Linear(7, 6).double()
    adapter = moved(entered(base, site_of(base), rank=3, init="pissa", dropout=0.5)).train()
    x = torch.randn(64, 7, dtype=torch.float64)
    torch.manual_seed(2)
    got = adapter.output(x, base(x))
    torch.manual_seed(2)
    mask = F.dropout(torch.ones_like(x), 0.5)
    left = base.weight - adapter.up0 @ adapter.down0
    torch.testing.assert_close(got, F.linear(x, left, base.bias) + (mask * x) @ adapter.down.T @ adapter.up.T)


# on models


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_rows_of_a_fused_weight_are_initialized_separately(init: str) -> None:
    torch.manual_seed(0)
    host = hosts.get("timm_vit")()
    model = host.tiny()["vit"]().eval()
    x = host.sample(model)
    bare = model(**x)
    tuned = attach(model, "lora", rank=3, init=init, where="attn.{q,v} mlp.in conv.patch", sample=True)
    assert torch.equal(model(**x), bare)
    for site, adapter in tuned.parts.values():
        weight = model.get_submodule(site.path).weight.detach()
        rows = weight[slice(*site.rows) if site.rows else slice(None)]
        again = entered(_layer(rows), WeightSite(**{**vars(site), "path": "0", "rows": None}), rank=3, init=init)
        assert torch.equal(adapter.down0, again.down0)
        assert torch.equal(adapter.up0, again.up0)


def _layer(weight: Tensor) -> nn.Module:
    layer = nn.Module()
    layer.weight = nn.Parameter(weight.clone())
    return layer


class Operations(TorchDispatchMode):
    """Records the names of all tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("init", "operation"), [("pissa", "aten::_linalg_svd"), ("olora", "aten::linalg_qr")])
def test_a_file_brings_its_own_start_and_nothing_is_decomposed_for_it(init: str, operation: str, tmp_path: Path) -> None:
    host = hosts.get("timm_vit")()
    torch.manual_seed(0)
    model = host.tiny()["vit"]().eval()
    other, x = copy.deepcopy(model), host.sample(model)
    with Operations() as seen:
        tuned = attach(model, "lora", rank=2, init=init, where="attn.{q,v}")
    assert operation in seen.names
    with torch.no_grad():
        for _, adapter in tuned.parts.values():
            for tensor in (adapter.down, adapter.up, adapter.down0, adapter.up0):
                tensor.normal_()
    path = tuned.save(tmp_path / "x")
    with Operations() as seen:
        loaded = veneer.load(other, path)
    assert operation not in seen.names
    assert loaded.state_dict().keys() == {f"{n}:{k}" for n in tuned.parts for k in ("down", "up", "down0", "up0")}
    assert torch.equal(other(**x), model(**x))
    values = dict(loaded.state_dict())
    partial = {k: v for k, v in values.items() if not k.endswith("0")}
    assert len(veneer.load(copy.deepcopy(host.tiny()["vit"]()), path, base="any", strict=False).state_dict()) == len(values)
    with raises(LoadError, missing=tuple(k for k in values if k.endswith("0"))):
        loaded.load_state_dict(partial)


@pytest.mark.parametrize("name", ["kohya", "diffusers"])
@pytest.mark.parametrize("options", [{"init": "pissa"}, {"init": "olora", "alpha": 3.0}, {"tucker": True, "alpha": 1.0}], ids=str)
def test_other_files_hold_the_same_change(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    from veneer import formats
    from veneer.testing.pipelines import tiny_pipeline

    pipe = tiny_pipeline("sd")
    tuned = attach(pipe, "lora", rank=2, where="unet.mid/xattn.{q,k} unet.mid/conv.*", **options)
    for _, adapter in tuned.parts.values():
        moved(adapter)
    path = getattr(formats, name).save(tuned, tmp_path / "x")
    expected = {n: a.scaling * a.delta() for n, (_, a) in tuned.parts.items()}
    loaded = veneer.load(tiny_pipeline("sd"), path)
    assert loaded.parts.keys() == expected.keys()
    for n, (_, adapter) in loaded.parts.items():
        torch.testing.assert_close(adapter.scaling * adapter.delta(), expected[n], rtol=1e-4, atol=1e-5)


def test_on_meta_nothing_is_decomposed_and_the_count_is_lora_s() -> None:
    counts = {init: attach(build("sd15"), "lora", init=init, where="xattn.*").report().trainable for init in ("kaiming", "pissa")}
    assert counts["pissa"] == counts["kaiming"] > 0


@parametrize_with_checks(
    [
        (LoRA(rank=2, init="pissa", alpha=3.0, dropout=0.1), "clip_text"),
        (LoRA(rank=2, tucker=True), "timm_vit"),
    ],
    once=["compiles_to_one_graph"],
)
def test_conformance(check: Any) -> None:
    check()


# one pair of the same change


@pytest.mark.parametrize("base", [*LAYERS, nn.Embedding(9, 6)], ids=repr)
def test_the_pair_of_twice_the_rank_is_the_same_change(base: Any) -> None:
    base = copy.deepcopy(base).double()
    site = TABLE if isinstance(base, nn.Embedding) else site_of(base)
    adapter = moved(entered(base, site, rank=4, init="pissa", alpha=2.0))
    down, up = adapter.pair()
    assert up.shape[1] == 2 * adapter.up.shape[1]
    torch.testing.assert_close(base.weight + 0.5 * pair_product(down, up, site), adapter.weight(base.weight))
    plain = LoRA(rank=4).build(site)
    assert plain.pair()[0] is plain.down
    assert plain.pair()[1] is plain.up


def test_an_embedding_is_initialized_from_its_table() -> None:
    table = nn.Embedding(9, 6).double()
    adapter = entered(table, TABLE, rank=6, init="pissa", alpha=3.0)  # the whole of it
    torch.testing.assert_close(adapter.scaling * adapter.down0 @ adapter.up0.T, table.weight.detach())
    moved(adapter)
    ids = torch.tensor([[0, 8, 3]])
    torch.testing.assert_close(adapter.output(ids, table(ids)), F.embedding(ids, adapter.weight(table.weight)))


# the Tucker core

CONVS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
    nn.Conv2d(4, 8, (3, 1), groups=2, padding="same"),
    nn.Conv3d(4, 6, 2),
    nn.Conv1d(4, 6, 3, stride=2),
]


@pytest.mark.parametrize("base", CONVS, ids=repr)
def test_tucker_in_both_forms(base: Any) -> None:
    """ΔW[o, i, k] = Σ_p Σ_q B[o, p] C[p, q, k] A[q, i] within each group."""
    base, site = copy.deepcopy(base).double(), site_of(base)
    method = LoRA(rank=4, alpha=2.0, tucker=True)
    adapter: Any = moved(method.build(site).double())
    assert isinstance(adapter, TuckerAdapter)
    change, rank, height = torch.zeros_like(base.weight), 4 // site.groups, site.d_out // site.groups
    for o in range(site.d_out):
        first = o // height * rank
        for p in range(rank):
            for q in range(rank):
                core, row = adapter.core[first + p, q], adapter.down[first + q].flatten()
                change[o] = change[o] + adapter.up[o, p].reshape(()) * row.view(-1, *[1] * core.ndim) * core
    expected = copy.deepcopy(base)
    expected.weight.data = (base.weight + 0.5 * change).detach()
    x = torch.randn(2, 4, *(7, 6, 5)[: len(site.kernel)], dtype=torch.float64)
    torch.testing.assert_close(adapter.weight(base.weight), expected.weight.data)
    torch.testing.assert_close(adapter.output(x, base(x)), expected(x))
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())


def test_tucker_is_that_of_lycoris() -> None:
    locon = pytest.importorskip("lycoris.modules.locon", reason="LyCORIS is not installed")
    base = nn.Conv2d(4, 6, 3, padding=1)
    theirs = locon.LoConModule("c", base, lora_dim=3, alpha=2.0, use_tucker=True)
    adapter: Any = LoRA(rank=3, alpha=2.0, tucker=True).build(site_of(base))
    names = {"down": theirs.lora_down, "core": theirs.lora_mid, "up": theirs.lora_up}
    assert {n: p.shape for n, p in adapter.named_parameters()} == {n: m.weight.shape for n, m in names.items()}
    for name, module in names.items():
        bound = adapter.get_parameter(name).abs().max()
        assert torch.equal(bound, bound * 0) == torch.equal(module.weight, torch.zeros_like(module.weight)), name
        nn.init.normal_(module.weight)
        adapter.get_parameter(name).data.copy_(module.weight)
    torch.testing.assert_close(adapter.scaling * adapter.delta(), theirs.get_diff_weight()[0])


def test_tucker_leaves_linear_layers_and_1x1_convolutions_and_has_lora_plus_rates() -> None:
    method = LoRA(rank=2, tucker=True, up_ratio=16.0)
    for base in (nn.Linear(4, 6), nn.Conv2d(4, 6, 1)):
        assert not isinstance(method.build(site_of(base)), TuckerAdapter)
    adapter = method.build(site_of(nn.Conv2d(4, 6, 3)))
    slow, fast = method.groups([(adapter.site, adapter)])
    assert [p is q for p, q in zip(slow["params"], (adapter.down, adapter.core), strict=True)] == [True, True]
    assert fast["params"][0] is adapter.up


# refusals


def test_a_quantized_weight_is_rejected() -> None:
    base = nn.Linear(6, 4)
    base.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
    with raises(UnsupportedSite, method="lora", site="l", option="init", given=torch.int8):
        LoRA(rank=2, init="pissa").build(site_of(nn.Linear(6, 4))).enter(nn.Sequential(base))


def test_a_rank_that_the_weight_does_not_have_is_rejected() -> None:
    with raises(OptionError, method="lora", option="rank", given=5, expected=4):
        LoRA(rank=5, init="olora").build(site_of(nn.Linear(6, 4)))
    with raises(OptionError, method="lora", option="rank", given=8, expected=6):
        LoRA(rank=8, init="olora").build(site_of(nn.Conv2d(6, 12, 1, groups=2)))
    with raises(OptionError, method="lora", option="alpha", given=-0.5):
        LoRA(rank=2, alpha=-1.0, init="pissa").build(site_of(nn.Linear(6, 4)))


@pytest.mark.parametrize(
    ("options", "option", "given"),
    [
        ({"pissa_niter": 2}, "pissa_niter", 2),
        ({"init": "pissa", "pissa_niter": -1}, "pissa_niter", -1),
        ({"init": "olora", "tucker": True}, "tucker", "olora"),
        ({"init": "svd"}, "init", "svd"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], option: str, given: Any) -> None:
    with raises(OptionError, method="lora", option=option, given=given):
        LoRA(**options)

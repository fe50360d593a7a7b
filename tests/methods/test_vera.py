"""VeRA's equation 2, W' = W + diag(b) B diag(d) A with A and B shared, against explicit sums and against peft."""

from __future__ import annotations

import copy

import peft
import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.layers import site_of
from tests.raising import raises
from veneer.injection import attach, hosts
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank.vera import VeRA, VeRAAdapter

LAYERS = [
    nn.Linear(6, 4),
    nn.Conv1d(4, 6, 3, padding=1),
    nn.Conv2d(4, 8, 3, stride=2),
    nn.Conv2d(4, 8, 3, groups=2, bias=False),
    nn.Conv2d(4, 8, (3, 1), groups=4, dilation=2),
    nn.Conv3d(4, 2, 2),
]


def built(base: nn.Module, trained: bool = True) -> VeRAAdapter:
    """An adapter whose shared matrices are larger than it needs."""
    torch.manual_seed(0)
    method, larger = VeRA(rank=5), WeightSite(name="x", role="x", path="x", d_out=11, d_in=50)
    adapter = method.build(site_of(base))
    adapter.shared = method.build_shared([site_of(base), larger])
    adapter = adapter.to(base.weight.dtype)
    if trained:
        nn.init.normal_(adapter.b)
        nn.init.normal_(adapter.d)
    return adapter


def change(adapter: VeRAAdapter, weight: Tensor) -> Tensor:
    """ΔW[o, i] = b[o] Σ_r B[o, r] d[r] A[r, i], i counted through the flattened kernel."""
    flat = torch.zeros_like(weight).flatten(1)
    for o in range(flat.shape[0]):
        for i in range(flat.shape[1]):
            flat[o, i] = adapter.b[o] * sum(adapter.shared.B[o, r] * adapter.d[r] * adapter.shared.A[r, i] for r in range(5))
    return flat.reshape(weight.shape)


@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_the_equation_in_both_forms(base: nn.Module) -> None:
    base = copy.deepcopy(base).double()
    adapter, expected = built(base), copy.deepcopy(base)
    with torch.no_grad():
        expected.weight += change(adapter, base.weight)
    shape = (2, 5, 6) if isinstance(base, nn.Linear) else (2, 4, *(7, 6, 5)[: base.weight.ndim - 2])
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(adapter.weight(base.weight), expected.weight)
    torch.testing.assert_close(adapter.output(x, base(x)), expected(x))


@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_a_new_adapter_is_the_identity_bitwise_and_trains_b_and_d(base: nn.Module) -> None:
    adapter = built(base, trained=False)
    assert torch.equal(adapter.weight(base.weight), base.weight)
    assert [k for k, _ in adapter.named_parameters()] == ["b", "d"]
    assert VeRA(rank=5).count(site_of(base)) == adapter.b.numel() + adapter.d.numel()
    assert adapter.d.unique().tolist() == pytest.approx([0.1])
    assert adapter.b.abs().max() == 0


def test_all_sites_use_the_first_columns_and_rows_of_one_pair() -> None:
    torch.manual_seed(0)
    host = hosts.get("timm_vit")()
    model = host.tiny()["vit"]().double().eval()
    by_hand, x = copy.deepcopy(model), host.sample(model)
    tuned = attach(model, "vera", rank=5, where="attn.{q,v} mlp.{in,out} conv.patch", sample=True)
    A, B = (t for k, t in tuned.state_dict().items() if k.startswith(next(iter(tuned.parts))) and "shared" in k)
    assert A.shape[1] == max(s.d_in // s.groups * (s.kernel[0] * s.kernel[1] if s.kernel else 1) for s, _ in tuned.parts.values())
    assert B.shape[0] == max(s.d_out for s, _ in tuned.parts.values())
    with torch.no_grad():
        for site, adapter in tuned.parts.values():
            adapter.b.normal_()
            rows = by_hand.get_submodule(site.path).weight[slice(*site.rows) if site.rows else slice(None)]
            flat = rows.flatten(1)
            more = adapter.b[:, None] * B[: len(flat)] @ (adapter.d[:, None] * A[:, : flat.shape[1]])
            rows += more.reshape(rows.shape)
        torch.testing.assert_close(model(**x), by_hand(**x))


def test_peft_gives_the_same_outputs() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 9)).double()
    config = peft.VeraConfig(r=5, target_modules=["0", "1"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model.model.double()
    for path in ("0", "1"):
        layer, adapter = theirs.get_submodule(path), built(base.get_submodule(path))
        with torch.no_grad():
            adapter.b.copy_(layer.vera_lambda_b["default"].normal_())
            adapter.d.copy_(layer.vera_lambda_d["default"])
            adapter.shared.A[:, :6] = layer.vera_A["default"]
            adapter.shared.B[:9] = layer.vera_B["default"]
        x = torch.randn(3, base.get_submodule(path).in_features, dtype=torch.float64)
        torch.testing.assert_close(adapter.output(x, base.get_submodule(path)(x)), layer(x))


def test_counts_of_vit_b() -> None:
    """12·(2,304 + 256) on the fused qkv; 12·(2,304 + 768 + 3,072 + 768 + 4·256) on all four linears. A and B are stored once."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    tuned = attach(vit, "vera", where="attn.qkv")
    assert tuned.report().trainable == 30_720
    assert tuned.report().stored == 30_720 + 256 * (768 + 2304)
    tuned.detach()
    assert attach(vit, "vera", where="attn.qkv attn.out mlp.in mlp.out").report().trainable == 95_232


@pytest.mark.parametrize("options", [{"rank": 0}, {"d_initial": 0.0}])
def test_options_out_of_range(options: dict) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="vera", option=option, given=given):
        VeRA(**options)

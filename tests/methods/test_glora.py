"""GLoRA: W' = W + W ∘ A + B and b' = b + b ∘ D + E for every form of the terms, one entry at a time, and against peft."""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests.methods.layers import conv_site
from tests.raising import raises
from veneer.injection import attach, hosts
from veneer.injection.errors import OptionError
from veneer.injection.sites import ParamSite, WeightSite
from veneer.methods.reparameterized.low_rank.glora import GLoRA, GLoRAAdapter, Term

FORMS = ("low_rank", "vector", "scalar", "none")
LINEAR = WeightSite(name="l", role="mlp.in", path="l", d_out=5, d_in=7)
GROUPED = WeightSite(
    name="c", role="conv", path="c", kind="conv", d_out=8, d_in=4, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1),
    groups=2,
)  # fmt: skip
BIAS = ParamSite(name="b", role="bias.mlp.in", path="l", param="bias", shape=(5,), called=True)


def trained(method: GLoRA, site: WeightSite | ParamSite) -> GLoRAAdapter:
    torch.manual_seed(0)
    adapter = method.build(site).double()
    for p in adapter.parameters():
        nn.init.normal_(p)
    return adapter


def entry(term: Term, o: int, i: int) -> torch.Tensor | float:
    """The term's element for output o and input i."""
    if term.form == "none":
        return 0.0
    if term.form == "low_rank":
        return sum(term.up[o, r] * term.down[r, i] for r in range(term.up.shape[1]))
    return term.up[o, 0] if term.form == "vector" else term.up[0, 0]


@pytest.mark.parametrize("site", [LINEAR, GROUPED], ids=["linear", "grouped"])
@pytest.mark.parametrize(("A", "B"), [*itertools.product(FORMS, FORMS)])
def test_weights(A: str, B: str, site: WeightSite) -> None:
    adapter = trained(GLoRA(A=A, B=B, rank=2), site)
    weight = torch.randn(site.weight_shape, dtype=torch.float64)
    expected = weight.flatten(1).clone()
    for o, i in itertools.product(*map(range, expected.shape)):
        expected[o, i] = expected[o, i] + expected[o, i] * entry(adapter.scale, o, i) + entry(adapter.shift, o, i)
    torch.testing.assert_close(adapter.weight(weight), expected.reshape(weight.shape))


@pytest.mark.parametrize(("D", "E"), [*itertools.product(FORMS[1:], FORMS[1:])])
def test_biases(D: str, E: str) -> None:
    adapter, bias = trained(GLoRA(D=D, E=E), BIAS), torch.randn(5, dtype=torch.float64)
    expected = torch.stack([bias[o] + bias[o] * entry(adapter.scale, o, 0) + entry(adapter.shift, o, 0) for o in range(5)])
    torch.testing.assert_close(adapter.weight(bias), expected)


@pytest.mark.parametrize("site", [LINEAR, GROUPED, BIAS], ids=["linear", "grouped", "bias"])
@pytest.mark.parametrize("options", [{}, {"A": "vector", "E": "none"}, {"A": "none", "B": "none", "D": "scalar", "E": "none"}])
def test_a_new_adapter_is_the_identity_bitwise_and_its_count_is_the_formula(options: dict, site: WeightSite) -> None:
    method = GLoRA(**options)
    adapter = method.build(site)
    tensor = torch.randn(site.shape if isinstance(site, ParamSite) else site.weight_shape)
    assert torch.equal(adapter.weight(tensor), tensor)
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())


def test_each_term_has_its_own_form() -> None:
    weight = GLoRA(A="vector", B="scalar", D="scalar", E="vector").build(LINEAR)
    bias = GLoRA(A="vector", B="scalar", D="scalar", E="vector").build(BIAS)
    assert (weight.scale.up.shape, weight.shift.up.shape) == ((5, 1), (1, 1))
    assert (bias.scale.up.shape, bias.shift.up.shape) == ((1, 1), (5, 1))


def test_only_one_factor_starts_at_zero() -> None:
    """`down` is Xavier-uniform, U(−√(6 / (rank + width)), …): if both were zero, neither would get a gradient."""
    site = WeightSite(name="l", role="l", path="l", d_out=4, d_in=600)
    for term in (lambda a: a.scale, lambda a: a.shift):
        found = term(GLoRA(rank=8).build(site))
        assert found.up.abs().max() == 0
        assert found.down.std().item() == pytest.approx((6 / 608 / 3) ** 0.5, rel=0.05)


def test_in_a_model_weights_and_biases_together() -> None:
    torch.manual_seed(0)
    host = hosts.get("timm_vit")()
    model = host.tiny()["vit"]().double().eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)  # new biases are zero, which D cannot scale
    by_hand, x = copy.deepcopy(model), host.sample(model)
    tuned = attach(model, "glora", rank=2, sample=True)
    assert {type(s) for s, _ in tuned.parts.values()} == {WeightSite, ParamSite}
    with torch.no_grad():
        for site, adapter in tuned.parts.values():
            for p in adapter.parameters():
                p.normal_(std=0.3)
            rows = getattr(by_hand.get_submodule(site.path), site.param)[slice(*site.rows) if site.rows else slice(None)]
            scale, shift = (t() if t.down is None else t.up @ t.down for t in (adapter.scale, adapter.shift))
            flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
            rows.copy_((flat + flat * scale + shift).reshape(rows.shape))
        torch.testing.assert_close(model(**x), by_hand(**x))
        tuned.merge()
        torch.testing.assert_close(model(**x), by_hand(**x))


def test_peft_gives_the_same_weight() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5)).double()
    config = peft.GloraConfig(
        r=2, target_modules=["0"], init_weights=False, config_A_B="lora", config_C="none", config_D_E="vector"
    )
    layer = peft.get_peft_model(copy.deepcopy(base), config).base_model.model[0].double()
    method = GLoRA(rank=2)
    weight, bias = method.build(LINEAR).double(), method.build(BIAS).double()
    with torch.no_grad():
        for term, theirs in ((weight.scale, layer.glora_A), (weight.shift, layer.glora_B)):
            term.up.copy_(theirs["default"].Xd)
            term.down.copy_(theirs["default"].Xu)
        for term, theirs in ((bias.scale, layer.glora_D), (bias.shift, layer.glora_E)):
            term.up.copy_(theirs["default"].X[:, None])
    x = torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, weight.weight(base[0].weight), bias.weight(base[0].bias)), layer(x))


def test_count_of_vit_b() -> None:
    """A block: 2·4·(4·(768 + 768) + 2·(768 + 3,072)) for A and B, twice its 6,912 biases for D and E."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    block = 2 * 4 * (4 * (768 + 768) + 2 * (768 + 3072)) + 2 * 6912
    assert attach(vit, "glora").report().trainable == 12 * block == 1_492_992


@pytest.mark.parametrize("options", [{"rank": 0}, {"A": "matrix"}, {"D": "low_rank"}])
def test_options_out_of_range(options: dict) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="glora", option=option, given=given):
        GLoRA(**options)


@pytest.mark.parametrize("base", [nn.Linear(6, 9), nn.Conv2d(6, 8, 3, groups=2)], ids=["linear", "grouped"])
def test_a_as_a_matrix(base: nn.Module) -> None:
    """W' = W + W A + B, A over the inputs of a kernel; one element at a time."""
    base = base.double()
    site = conv_site(base) if isinstance(base, nn.Conv2d) else WeightSite(name="l", role="mlp.in", path="l", d_out=9, d_in=6)
    method = GLoRA(rank=2, product="matrices")
    adapter = trained(method, site)
    weight = base.weight.detach()
    a, b = adapter.scale().detach(), adapter.shift().detach().reshape(weight.shape)
    want = torch.zeros_like(weight)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            want[o, i] = weight[o, i] + b[o, i] + sum(weight[o, j] * a[j, i] for j in range(weight.shape[1]))
    torch.testing.assert_close(adapter.weight(weight), want)
    assert sum(p.numel() for p in adapter.parameters()) == method.count(site)
    with raises(OptionError, method="glora", option="product", given="both"):
        GLoRA(product="both")

"""FacT's tensors, ΔW_j = s·V Σ_j U over the d × d matrices of all layers, against sums over the factors' entries."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.layers import site_of
from tests.raising import raises
from veneer.injection import attach, hosts
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank.fact import FacT, FacTAdapter, tiles

LAYERS = [
    nn.Linear(4, 4),
    nn.Linear(4, 12),
    nn.Linear(12, 4, bias=False),
    nn.Linear(6, 4),
    nn.Conv1d(4, 8, 3, padding=1),
    nn.Conv2d(8, 4, 3, stride=2),
    nn.Conv2d(4, 6, (1, 2), dilation=2),
]


def built(method: FacT, base: nn.Module, trained: bool = True) -> FacTAdapter:
    torch.manual_seed(0)
    adapter = method.build(site_of(base))
    adapter.shared = method.build_shared([site_of(base)])
    adapter = adapter.to(base.weight.dtype).eval()
    if trained:
        with torch.no_grad():
            for p in adapter.shared.V.values():
                p.normal_()
    return adapter


def sigma(adapter: FacTAdapter, form: str, o: int, i: int, place: int) -> Tensor:
    """Σ of the tile in row `o` and column `i` at a position of the kernel; for `tk` Σ_n P[n, j] C[:, :, n], j in that order."""
    r = adapter.rank
    if form == "tt":
        return adapter.sigma[o * r : (o + 1) * r, i * r : (i + 1) * r].reshape(r, r, -1)[..., place]
    places = adapter.P.shape[1] // (adapter.n_out * adapter.n_in)
    j = (o * adapter.n_in + i) * places + place
    return sum(adapter.P[n, j] * adapter.shared.C[:, :, n] for n in range(r))


def change(adapter: FacTAdapter, base: nn.Module, form: str, scale: float) -> Tensor:
    weight = torch.zeros_like(base.weight).flatten(2) if base.weight.ndim > 2 else torch.zeros_like(base.weight).unsqueeze(-1)
    n_out, n_in, d_out, d_in = tiles(site_of(base))
    U, V = adapter.shared.U[str(d_in)], adapter.shared.V[str(d_out)]
    for o, i, place in itertools.product(range(n_out), range(n_in), range(weight.shape[-1])):
        tile = scale * V @ sigma(adapter, form, o, i, place) @ U
        weight[o * d_out : (o + 1) * d_out, i * d_in : (i + 1) * d_in, place] = tile
    return weight.reshape(base.weight.shape).detach()


@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_the_equation_in_both_forms(base: nn.Module, form: str) -> None:
    base = copy.deepcopy(base).double()
    adapter, expected = built(FacT(form=form, rank=3, scale=0.7), base), copy.deepcopy(base)
    with torch.no_grad():
        expected.weight += change(adapter, base, form, 0.7)
    width = base.weight.shape[1]
    x = torch.randn((2, 5, width) if isinstance(base, nn.Linear) else (2, width, *(7, 6)[: base.weight.ndim - 2])).double()
    torch.testing.assert_close(adapter.weight(base.weight), expected.weight)
    torch.testing.assert_close(adapter.output(x, base(x)), expected(x))


@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_a_new_adapter_is_the_identity_bitwise_and_its_count_is_the_formula(base: nn.Module, form: str) -> None:
    method = FacT(form=form, rank=3)
    adapter = built(method, base, trained=False)
    assert torch.equal(adapter.weight(base.weight), base.weight)
    own = [p for name, p in adapter.named_parameters() if not name.startswith("shared.")]
    assert method.count(site_of(base)) == sum(p.numel() for p in own)
    assert all(p.abs().max() > 0 for p in own)


def test_wide_weights_are_split_into_squares() -> None:
    shapes = {(8, 8): (1, 1, 8, 8), (32, 8): (4, 1, 8, 8), (8, 32): (1, 4, 8, 8), (8, 20): (1, 1, 8, 20), (20, 8): (1, 1, 20, 8)}
    for (d_out, d_in), cut in shapes.items():
        assert tiles(WeightSite(name="l", role="l", path="l", d_out=d_out, d_in=d_in)) == cut


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_all_layers_use_the_same_factors(form: str) -> None:
    torch.manual_seed(0)
    host = hosts.get("timm_vit")()
    model = host.tiny()["vit"]().double().eval()
    by_hand, x = copy.deepcopy(model), host.sample(model)
    tuned = attach(model, "fact", form=form, rank=3)
    (V,) = next(iter(tuned.parts.values()))[1].shared.V.values()
    with torch.no_grad():
        V.normal_(std=0.5)
        for site, adapter in tuned.parts.values():
            rows = by_hand.get_submodule(site.path).weight[slice(*site.rows) if site.rows else slice(None)]
            part = nn.Linear(site.d_in, site.d_out, bias=False).double()
            rows += change(adapter, part, form, 1.0)
        torch.testing.assert_close(model(**x), by_hand(**x))


def test_published_counts() -> None:
    """ViT-B/16, 144 matrices of 768 × 768: 2·768·16 + 144·16² and 2·768·32 + 32³ + 144·32."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    for options, count in (({"form": "tt", "rank": 16}, 61_440), ({"form": "tk", "rank": 32}, 86_528)):
        tuned = attach(vit, "fact", **options)
        assert tuned.report().trainable == count
        tuned.detach()


@pytest.mark.parametrize("rank", [8, 32])
def test_p_starts_in_the_bound_of_one_matrix_for_all_sites(rank: int) -> None:
    """The code: P (r, 144) of ViT-B/16, Xavier-uniform, so U(-b, b) with b = sqrt(6 / (r + 144))."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    tuned = attach(vit, "fact", form="tk", rank=rank)
    values = torch.cat([a.P.flatten() for _, a in tuned.parts.values()])
    assert values.numel() == rank * 144
    bound = (6 / (rank + 144)) ** 0.5
    assert 0.98 * bound < values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_dropout_acts_between_sigma_and_v_in_training_only() -> None:
    base = nn.Linear(4, 4).double()
    adapter = built(FacT(rank=3, dropout=0.5), base)
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.zeros(64, 4, dtype=torch.float64)
    assert torch.equal(adapter.output(x, y), adapter.output(x, y))
    adapter.train()
    torch.manual_seed(1)
    got = adapter.output(x, y)
    torch.manual_seed(1)
    mask = nn.functional.dropout(torch.ones(64, 3, dtype=torch.float64), 0.5)
    expected = (mask * (x @ adapter.shared.U["4"].T @ adapter.sigma.T)) @ adapter.shared.V["4"].T
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("options", [{"form": "cp"}, {"rank": 0}, {"dropout": 1.0}])
def test_options_out_of_range(options: dict) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="fact", option=option, given=given):
        FacT(**options)


def test_grouped_convolutions_are_rejected() -> None:
    with raises(OptionError, method="fact", option="where", given=2, expected=1):
        FacT().build(site_of(nn.Conv2d(4, 8, 3, groups=2)))

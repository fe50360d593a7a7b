"""Merging against dense matrices from the papers' formulas, and against peft where the conventions agree."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.adapter_merging.cases import change, lost, pipeline, put
from tests.raising import raises
from veneer.adapter_merging import CombineError, RankSelection, combine, resize
from veneer.injection import SelectionError, StateError
from veneer.injection.errors import OptionError


def two(pipe: Any, **second: Any) -> list[Any]:
    """Two LoRAs of ranks 2 and 3 with different alphas; each has a site that the other lacks."""
    first = put(pipe, "lora", 1, ("attn.{q,out}", "conv.io"), rank=2, alpha=3.0)
    return [first, put(pipe, "lora", 2, ("attn.{q,out}", "text/attn.q"), **{"rank": 3, "alpha": 1.5, **second})]


def dense(sources: list[Any], weights: list[float]) -> dict[str, Tensor]:
    """Σ w·ΔW of each weight."""
    found: dict[str, Tensor] = {}
    for source, weight in zip(sources, weights, strict=True):
        for name in source.parts:
            found[name] = found.get(name, torch.zeros(())) + weight * change(source, name)
    return found


@pytest.mark.parametrize("weights", [None, [0.7, 0.5], [1.0, -1.5]])
def test_sum_is_exact(weights: list[float] | None) -> None:
    pipe = pipeline()
    sources = two(pipe, rslora=True)
    sources[1].scale = 0.6
    expected = dense(sources, weights or [1.0, 1.0])
    result = combine(pipe, sources, weights)
    assert veneer.attachments(pipe) == [result.attachment]
    assert result.attachment.parts.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(change(result.attachment, name), delta, rtol=0, atol=1e-7)
    assert {(m.site.component, m.site.role): m.rank for m in result.factors} == {
        ("unet", "attn.q"): 5, ("unet", "attn.out"): 5, ("unet", "conv.io"): 2, ("text_encoder", "attn.q"): 3
    }  # fmt: skip
    assert result.error < 1e-6


def test_sum_has_the_output_of_both_adapters() -> None:
    pipe = pipeline()
    sources = two(pipe)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 4, 24))
    with torch.no_grad():
        both = pipe.unet(*inputs).sample
        combine(pipe, sources)
        torch.testing.assert_close(pipe.unet(*inputs).sample, both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["sum", "svd"])
def test_single_source_at_weight_1_is_copied_bitwise(how: Any) -> None:
    pipe = pipeline()
    source = put(pipe, "lora", 1, rank=3, alpha=1.7, by_site={"attn.q": {"rank": 2}}, rslora=True)
    state = {k: v.clone() for k, v in source.state_dict().items()}
    expected = {name: change(source, name) for name in source.parts}
    result = combine(pipe, [source], [1.0], how=how)
    assert all(torch.equal(v, state[k]) for k, v in result.attachment.state_dict().items())
    assert result.attachment.state_dict().keys() == state.keys()
    assert all(lost(expected[name], change(result.attachment, name)) < 1e-15 for name in expected)
    assert result.error == 0


@pytest.mark.parametrize("method", [{"method": "loha", "rank": 2}, {"method": "dora", "rank": 2}, {"method": "ia3"}])
def test_svd_of_methods_with_a_weight_form(method: dict[str, Any]) -> None:
    """ΔW of additive methods, weight(W) − W of others; compared with a dense truncated SVD."""
    pipe = pipeline()
    sources = [put(pipe, "lora", 1, rank=2), put(pipe, seed=2, where=("attn.{q,out}", "conv.io"), **method)]
    expected = dense(sources, [0.5, 2.0])
    result = combine(pipe, sources, [0.5, 2.0], how="svd", keep=3)
    for name, delta in expected.items():
        u, s, vh = torch.linalg.svd(delta)
        best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
        torch.testing.assert_close(change(result.attachment, name), best, rtol=0, atol=2e-6)
        assert result.errors()[name] == pytest.approx(lost(delta, best), abs=1e-6)
    whole = math.sqrt(sum(float((d - change(result.attachment, n)).pow(2).sum()) for n, d in expected.items()))
    assert result.error == pytest.approx(whole / math.sqrt(sum(float(d.pow(2).sum()) for d in expected.values())), abs=1e-6)
    assert result.error > 0.01


def test_grouped_convolutions_and_embeddings() -> None:
    from tests.injection.toy import ToyHost, net

    veneer.hosts.register(ToyHost)
    try:
        for how, keep in (("sum", None), ("svd", 8)):
            model = net()
            sources = [put(model, "lora", seed, "conv embed.token attn.v", rank=2, alpha=3.0) for seed in (1, 2)]
            expected = {}
            for name, (site, _) in sources[0].parts.items():
                rows = slice(*site.rows) if site.rows else slice(None)
                weight = model.get_parameter(f"{site.path}.weight")[rows].detach().double()
                adapters = [copy.deepcopy(s.parts[name][1]).double() for s in sources]
                expected[name] = sum(w * (a.weight(weight) - weight) for a, w in zip(adapters, (0.5, 2.0), strict=True))
            result = combine(model, sources, [0.5, 2.0], how=how, keep=keep)  # type: ignore[arg-type]
            for name, (site, adapter) in result.attachment.parts.items():
                torch.testing.assert_close(
                    adapter.weight(torch.zeros(site.weight_shape)).double(), expected[name], rtol=0, atol=1e-6
                )
            assert result.error < 1e-6
    finally:
        veneer.hosts.unregister("toy")


def test_weights_by_selection() -> None:
    """The last matching pattern counts, other sites have weight 1, and sources of weight 0 add no rank."""
    pipe = pipeline()
    sources = two(pipe)
    apart = [dense([s], [1.0]) for s in sources]
    result = combine(pipe, sources, [{"attn": 0.5, "attn.out": -2.0}, {"text/attn": 0.25, "attn.q": 0}])
    for m in result.factors:
        name, role, tower = m.site.name, m.site.role, m.site.component
        first = {"attn.q": 0.5, "attn.out": -2.0}.get(role, 1.0) if name in apart[0] else 0.0
        second = 0.25 if tower == "text_encoder" else {"attn.q": 0.0}.get(role, 1.0)
        expected = sum(w * a[name] for w, a in zip((first, second), apart, strict=True) if name in a)
        torch.testing.assert_close(change(result.attachment, name), expected, rtol=0, atol=1e-7)
        assert m.rank == (2 if role == "attn.q" and tower == "unet" else {"conv.io": 2, "attn.q": 3}.get(role, 5))


def ties_of(changes: list[Tensor], weights: list[float], density: float) -> Tensor:
    """TIES entry by entry: trim, elect, and the mean of w·τ over the entries with the elected sign."""
    trimmed = []
    for tau in changes:
        count = int(density * tau.numel())
        least = sorted(tau.abs().flatten().tolist(), reverse=True)[count - 1]
        trimmed.append(torch.where(tau.abs() >= least, tau, 0.0).flatten().tolist())
    merged = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [w * x for w, x in zip(weights, entries, strict=True) if x * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(changes[0])


def test_ties_matches_the_paper() -> None:
    pipe = pipeline()
    sources = [put(pipe, "lora", seed, "attn.q", rank=2) for seed in (1, 2, 3)]
    expected = {n: ties_of([change(s, n) for s in sources], [1.0, 0.5, 2.0], 0.4) for n in sources[0].parts}
    result = combine(pipe, sources, [1.0, 0.5, 2.0], how="ties", keep=RankSelection(energy=1.0), density=0.4)
    for name, delta in expected.items():
        torch.testing.assert_close(change(result.attachment, name), delta, rtol=0, atol=2e-6)


def test_ties_negative_weight_negates_the_adapter() -> None:
    found = []
    for sign in (1, -1):
        pipe = pipeline()
        sources = [put(pipe, "lora", seed, "attn.q", rank=2) for seed in (1, 2)]
        with torch.no_grad():
            for _, adapter in sources[1].parts.values():
                adapter.up.mul_(sign)
        result = combine(pipe, sources, [1.0, 0.5 * sign], how="ties", keep=16)
        found.append({n: change(result.attachment, n) for n in result.attachment.parts})
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


def test_dare_drops_and_rescales_entries() -> None:
    """Every entry of a single source is dropped or divided by the density; the same seed gives the same result."""
    results = []
    for seed in (7, 7, 8):
        pipe = pipeline()
        source = put(pipe, "lora", 1, "attn", rank=2)
        expected = {n: change(source, n) for n in source.parts}
        result = combine(pipe, [source], [0.5], how="dare", keep=64, density=0.25, seed=seed)
        results.append({n: change(result.attachment, n) for n in expected})
    kept = {n: (results[0][n].abs() > 1e-5) & (w.abs() > 1e-4) for n, w in expected.items()}
    for name, delta in expected.items():
        torch.testing.assert_close(results[0][name], torch.where(kept[name], 0.5 * delta / 0.25, 0.0), rtol=0, atol=1e-3)
        close = results[0][name][kept[name]] - 2 * delta[kept[name]]
        assert float(close.abs().max()) < 1e-5
    share = sum(int(m.sum()) for m in kept.values()) / sum(m.numel() for m in kept.values())
    assert share == pytest.approx(0.25, abs=0.03)
    assert all(torch.equal(results[0][n], results[1][n]) for n in expected)
    assert not any(torch.equal(results[0][n], results[2][n]) for n in expected)
    assert len({tuple(m.flatten().tolist()) for m in kept.values()}) == len(kept)  # another mask for each weight


def test_dare_ties_at_density_1_is_the_elected_mean() -> None:
    """At density 1 nothing is dropped or trimmed."""
    pipe = pipeline()
    sources = [put(pipe, "lora", seed, "attn.q", rank=2) for seed in (1, 2)]
    expected = {n: ties_of([change(s, n) for s in sources], [1.0, 2.0], 1.0) for n in sources[0].parts}
    result = combine(pipe, sources, [1.0, 2.0], how="dare_ties", keep=64, density=1.0)
    for name, delta in expected.items():
        torch.testing.assert_close(change(result.attachment, name), delta, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("how", "theirs"), [("sum", "cat"), ("svd", "svd"), ("ties", "ties_svd")])
def test_combine_matches_peft(how: Any, theirs: str) -> None:
    peft = pytest.importorskip("peft")
    pipe = pipeline()
    sources = [put(pipe, "lora", seed, "attn.{q,v}", rank=2, alpha=3.0) for seed in (1, 2)]
    name = next(iter(sources[0].parts))
    pairs = [s.parts[name][1] for s in sources]
    model = nn.Sequential(nn.Linear(pairs[0].down.shape[1], len(pairs[0].up), bias=False))
    judge = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]), "first")
    judge.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    layer = judge.base_model.model[0]
    with torch.no_grad():
        for key, pair in zip(("first", "second"), pairs, strict=True):
            layer.lora_A[key].weight.copy_(pair.down)
            layer.lora_B[key].weight.copy_(pair.up)
    options = {} if how == "sum" else {"svd_rank": 3} | ({"density": 0.5} if how == "ties" else {})
    judge.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type=theirs, **options)
    ours = {} if how == "sum" else {"keep": 3} | ({"density": 0.5} if how == "ties" else {})
    result = combine(pipe, sources, [0.7, 0.4], how=how, **ours)
    torch.testing.assert_close(change(result.attachment, name).float(), layer.get_delta_weight("both"), rtol=0, atol=2e-6)


def test_error_includes_rounding() -> None:
    pipe = pipeline()
    result = combine(pipe, two(pipe), [0.3, 0.3], dtype=torch.float16)
    assert 1e-5 < result.error < 1e-3
    assert all(torch.equal(p.half().float(), p) for p in result.attachment.parameters())


@pytest.mark.parametrize(
    ("options", "error", "data"),
    [
        ({"weights": [1.0]}, OptionError, {"option": "weights", "given": 1, "expected": 2}),
        ({"how": "linear"}, OptionError, {"option": "how", "given": "linear"}),
        ({"keep": 2}, OptionError, {"option": "keep", "given": 2, "expected": None}),
        ({"density": 0.5}, OptionError, {"option": "density", "given": 0.5}),
        ({"how": "ties", "density": 0.0}, OptionError, {"option": "density", "given": 0.0}),
        ({"weights": [{"mlp": 0.5}, 1.0]}, SelectionError, {"pattern": "mlp", "given": ()}),
        ({"weights": [0.0, 0.0]}, CombineError, {"given": 0, "expected": 1}),
    ],
)
def test_combine_errors_leave_the_model_unchanged(options: Any, error: Any, data: dict[str, Any]) -> None:
    pipe = pipeline()
    sources = two(pipe)
    with raises(error, **data):
        combine(pipe, sources, **options)
    assert veneer.attachments(pipe) == sources


def test_combine_rejects_unsupported_adapters() -> None:
    pipe = pipeline()
    lora, bias = put(pipe, "lora", 1, rank=2), put(pipe, "bitfit", 2, "bias.attn.out")
    loha = put(pipe, "loha", 3, rank=2)
    with raises(CombineError, given=bias.name, expected="weight"):
        combine(pipe, [lora, bias], how="svd")
    with raises(CombineError, given="sum", expected="svd"):
        combine(pipe, [lora, loha])
    with raises(CombineError, where="keep", given="loha"):
        combine(pipe, [loha], how="svd")
    lora.merge()
    with raises(StateError, where="lora_1", given="merged"):
        resize(pipe, lora, 1)
    lora.unmerge()
    assert veneer.attachments(pipe) == [lora, bias, loha]

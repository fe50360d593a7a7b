"""Combinations against dense matrices written from the papers, and against peft where the conventions agree."""

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
from veneer.adapter_merging import CombineError, Keep, combine, resize
from veneer.injection import SelectionError, StateError
from veneer.injection.errors import OptionError


def two(pipe: Any, **second: Any) -> list[Any]:
    """LoRA of ranks 2 and 3 with scales of their own; each has a site that the other has not."""
    first = put(pipe, "lora", 1, ("attn.{q,out}", "conv.io"), rank=2, alpha=3.0)
    return [first, put(pipe, "lora", 2, ("attn.{q,out}", "text/attn.q"), **{"rank": 3, "alpha": 1.5, **second})]


def dense(sources: list[Any], weights: list[float]) -> dict[str, Tensor]:
    """Σ w·ΔW, weight by weight."""
    found: dict[str, Tensor] = {}
    for source, weight in zip(sources, weights, strict=True):
        for name in source.parts:
            found[name] = found.get(name, torch.zeros(())) + weight * change(source, name)
    return found


@pytest.mark.parametrize("weights", [None, [0.7, 0.5], [1.0, -1.5]])
def test_the_sum_is_exact(weights: list[float] | None) -> None:
    pipe = pipeline()
    sources = two(pipe, rslora=True)
    sources[1].scale = 0.6
    wanted = dense(sources, weights or [1.0, 1.0])
    made = combine(pipe, sources, weights)
    assert veneer.attachments(pipe) == [made.attachment]
    assert made.attachment.parts.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(change(made.attachment, name), delta, rtol=0, atol=1e-7)
    assert {(m.site.component, m.site.role): m.rank for m in made.made} == {
        ("unet", "attn.q"): 5, ("unet", "attn.out"): 5, ("unet", "conv.io"): 2, ("text_encoder", "attn.q"): 3
    }  # fmt: skip
    assert made.error < 1e-6


def test_the_sum_acts_as_both_did() -> None:
    pipe = pipeline()
    sources = two(pipe)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 4, 24))
    with torch.no_grad():
        both = pipe.unet(*inputs).sample
        combine(pipe, sources)
        torch.testing.assert_close(pipe.unet(*inputs).sample, both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["sum", "svd"])
def test_one_alone_at_weight_1_is_itself_bitwise(how: Any) -> None:
    pipe = pipeline()
    source = put(pipe, "lora", 1, rank=3, alpha=1.7, ranks={"attn.q": 2}, rslora=True)
    state = {k: v.clone() for k, v in source.state_dict().items()}
    wanted = {name: change(source, name) for name in source.parts}
    made = combine(pipe, [source], [1.0], how=how)
    assert all(torch.equal(v, state[k]) for k, v in made.attachment.state_dict().items())
    assert made.attachment.state_dict().keys() == state.keys()
    assert all(lost(wanted[name], change(made.attachment, name)) < 1e-15 for name in wanted)
    assert made.error == 0


@pytest.mark.parametrize("method", [{"method": "loha", "rank": 2}, {"method": "dora", "rank": 2}, {"method": "ia3"}])
def test_any_method_with_a_weight_form_is_cut_to_a_rank(method: dict[str, Any]) -> None:
    """Additive ones as ΔW, the others as weight(W) − W; the best of that rank, by a dense decomposition."""
    pipe = pipeline()
    sources = [put(pipe, "lora", 1, rank=2), put(pipe, seed=2, where=("attn.{q,out}", "conv.io"), **method)]
    wanted = dense(sources, [0.5, 2.0])
    made = combine(pipe, sources, [0.5, 2.0], how="svd", keep=3)
    for name, delta in wanted.items():
        u, s, vh = torch.linalg.svd(delta)
        best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
        torch.testing.assert_close(change(made.attachment, name), best, rtol=0, atol=2e-6)
        assert made.errors()[name] == pytest.approx(lost(delta, best), abs=1e-6)
    whole = math.sqrt(sum(float((d - change(made.attachment, n)).pow(2).sum()) for n, d in wanted.items()))
    assert made.error == pytest.approx(whole / math.sqrt(sum(float(d.pow(2).sum()) for d in wanted.values())), abs=1e-6)
    assert made.error > 0.01


def test_grouped_convolutions_and_embeddings() -> None:
    from tests.injection.toy import ToyHost, net

    veneer.hosts.register(ToyHost)
    try:
        for how, keep in (("sum", None), ("svd", 8)):
            model = net()
            sources = [put(model, "lora", seed, "conv embed.token attn.v", rank=2, alpha=3.0) for seed in (1, 2)]
            wanted = {}
            for name, (site, _) in sources[0].parts.items():
                rows = slice(*site.rows) if site.rows else slice(None)
                weight = model.get_parameter(f"{site.path}.weight")[rows].detach().double()
                adapters = [copy.deepcopy(s.parts[name][1]).double() for s in sources]
                wanted[name] = sum(w * (a.weight(weight) - weight) for a, w in zip(adapters, (0.5, 2.0), strict=True))
            made = combine(model, sources, [0.5, 2.0], how=how, keep=keep)  # type: ignore[arg-type]
            for name, (site, adapter) in made.attachment.parts.items():
                torch.testing.assert_close(
                    adapter.weight(torch.zeros(site.weight_shape)).double(), wanted[name], rtol=0, atol=1e-6
                )
            assert made.error < 1e-6
    finally:
        veneer.hosts.unregister("toy")


def test_weights_by_selection() -> None:
    """The last pattern that matches counts; what none matches has 1, and a weight of 0 takes no rank."""
    pipe = pipeline()
    sources = two(pipe)
    apart = [dense([s], [1.0]) for s in sources]
    made = combine(pipe, sources, [{"attn": 0.5, "attn.out": -2.0}, {"text/attn": 0.25, "attn.q": 0}])
    for m in made.made:
        name, role, tower = m.site.name, m.site.role, m.site.component
        first = {"attn.q": 0.5, "attn.out": -2.0}.get(role, 1.0) if name in apart[0] else 0.0
        second = 0.25 if tower == "text_encoder" else {"attn.q": 0.0}.get(role, 1.0)
        wanted = sum(w * a[name] for w, a in zip((first, second), apart, strict=True) if name in a)
        torch.testing.assert_close(change(made.attachment, name), wanted, rtol=0, atol=1e-7)
        assert m.rank == (2 if role == "attn.q" and tower == "unet" else {"conv.io": 2, "attn.q": 3}.get(role, 5))


def ties_of(changes: list[Tensor], weights: list[float], density: float) -> Tensor:
    """TIES number by number: trim, elect, and the mean of w·τ over those of the elected sign."""
    trimmed = []
    for tau in changes:
        count = int(density * tau.numel())
        least = sorted(tau.abs().flatten().tolist(), reverse=True)[count - 1]
        trimmed.append(torch.where(tau.abs() >= least, tau, 0.0).flatten().tolist())
    merged = []
    for numbers in zip(*trimmed, strict=True):
        sign = 1 if sum(numbers) >= 0 else -1
        agreeing = [w * x for w, x in zip(weights, numbers, strict=True) if x * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(changes[0])


def test_ties() -> None:
    pipe = pipeline()
    sources = [put(pipe, "lora", seed, "attn.q", rank=2) for seed in (1, 2, 3)]
    wanted = {n: ties_of([change(s, n) for s in sources], [1.0, 0.5, 2.0], 0.4) for n in sources[0].parts}
    made = combine(pipe, sources, [1.0, 0.5, 2.0], how="ties", keep=Keep(energy=1.0), density=0.4)
    for name, delta in wanted.items():
        torch.testing.assert_close(change(made.attachment, name), delta, rtol=0, atol=2e-6)


def test_a_negative_weight_is_the_opposite_adapter() -> None:
    found = []
    for sign in (1, -1):
        pipe = pipeline()
        sources = [put(pipe, "lora", seed, "attn.q", rank=2) for seed in (1, 2)]
        with torch.no_grad():
            for _, adapter in sources[1].parts.values():
                adapter.up.mul_(sign)
        made = combine(pipe, sources, [1.0, 0.5 * sign], how="ties", keep=16)
        found.append({n: change(made.attachment, n) for n in made.attachment.parts})
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


def test_dare_drops_a_share_and_scales_the_rest() -> None:
    """One source alone: every number is dropped, or divided by the density; the same seed draws the same."""
    results = []
    for seed in (7, 7, 8):
        pipe = pipeline()
        source = put(pipe, "lora", 1, "attn", rank=2)
        wanted = {n: change(source, n) for n in source.parts}
        made = combine(pipe, [source], [0.5], how="dare", keep=64, density=0.25, seed=seed)
        results.append({n: change(made.attachment, n) for n in wanted})
    stayed = {n: (results[0][n].abs() > 1e-5) & (w.abs() > 1e-4) for n, w in wanted.items()}
    for name, delta in wanted.items():
        torch.testing.assert_close(results[0][name], torch.where(stayed[name], 0.5 * delta / 0.25, 0.0), rtol=0, atol=1e-3)
        close = results[0][name][stayed[name]] - 2 * delta[stayed[name]]
        assert float(close.abs().max()) < 1e-5
    share = sum(int(m.sum()) for m in stayed.values()) / sum(m.numel() for m in stayed.values())
    assert share == pytest.approx(0.25, abs=0.03)
    assert all(torch.equal(results[0][n], results[1][n]) for n in wanted)
    assert not any(torch.equal(results[0][n], results[2][n]) for n in wanted)
    assert len({tuple(m.flatten().tolist()) for m in stayed.values()}) == len(stayed)  # each weight has draws of its own


def test_dare_ties_elects_among_what_was_not_dropped() -> None:
    """At density 1 nothing is dropped and nothing trimmed: the elected mean alone."""
    pipe = pipeline()
    sources = [put(pipe, "lora", seed, "attn.q", rank=2) for seed in (1, 2)]
    wanted = {n: ties_of([change(s, n) for s in sources], [1.0, 2.0], 1.0) for n in sources[0].parts}
    made = combine(pipe, sources, [1.0, 2.0], how="dare_ties", keep=64, density=1.0)
    for name, delta in wanted.items():
        torch.testing.assert_close(change(made.attachment, name), delta, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("how", "theirs"), [("sum", "cat"), ("svd", "svd"), ("ties", "ties_svd")])
def test_as_peft_where_the_conventions_agree(how: Any, theirs: str) -> None:
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
    made = combine(pipe, sources, [0.7, 0.4], how=how, **ours)
    torch.testing.assert_close(change(made.attachment, name).float(), layer.get_delta_weight("both"), rtol=0, atol=2e-6)


def test_rounding_is_part_of_the_error() -> None:
    pipe = pipeline()
    made = combine(pipe, two(pipe), [0.3, 0.3], dtype=torch.float16)
    assert 1e-5 < made.error < 1e-3
    assert all(torch.equal(p.half().float(), p) for p in made.attachment.parameters())


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
def test_what_is_refused_leaves_everything_as_it_was(options: Any, error: Any, data: dict[str, Any]) -> None:
    pipe = pipeline()
    sources = two(pipe)
    with raises(error, **data):
        combine(pipe, sources, **options)
    assert veneer.attachments(pipe) == sources


def test_adapters_that_a_lora_cannot_hold() -> None:
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

"""FISH mask: the entries with the largest Σ g², and only they, are trained; against plain autograd on a bare model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch

import veneer
from tests.methods.selections import MODELS, at_sites, explicit, losses, plain_gradients, tiny
from tests.raising import raises
from veneer.injection import LoadError, attach
from veneer.injection.errors import EmptySelection, NotSelected, OptionError
from veneer.methods.selective.entries.fish_mask import FishMask
from veneer.testing.case import loss


@pytest.mark.parametrize(("host", "name", "score"), [*((*each, "square") for each in MODELS), (*MODELS[0], "absolute")])
def test_selection_outputs_gradients_and_merged_weights_are_those_of_a_masked_model(host: str, name: str, score: str) -> None:
    model, samples = tiny(host, name)
    bare = copy.deepcopy(model)
    parts = plain_gradients(model, samples)
    tuned = attach(model, "fish_mask", keep_ratio=0.02, score=score)
    tuned.select(losses(model, samples))
    entries = next(iter(tuned.parts.values()))[1].own
    power = 2 if score == "square" else 1
    by_site = zip(*(at_sites(tuned, of_sample) for of_sample in parts), strict=True)
    scores = torch.cat([sum(g.abs() ** power for g in of_site).flatten() for of_site in by_site])
    count = int(0.02 * len(scores))
    assert len(entries.values) == count
    assert entries.indices.tolist() == sorted(scores.argsort(descending=True)[:count].tolist())

    assert torch.equal(entries.values, torch.zeros_like(entries.values))
    torch.nn.init.normal_(entries.values, std=0.05)
    weights = at_sites(tuned, dict(bare.named_parameters()))
    flat = torch.zeros_like(scores)
    flat[entries.indices.long()] = entries.values.detach()
    pieces = flat.split([weight.numel() for weight in weights])
    deltas = [piece.reshape(weight.shape) for piece, weight in zip(pieces, weights, strict=True)]
    changed = explicit(bare, tuned, deltas)
    got = loss(model, samples[0])
    torch.testing.assert_close(got, loss(changed, samples[0]), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(got, [entries.values])
    (of_sample,) = plain_gradients(changed, samples[:1])
    whole = torch.cat([g.flatten() for g in at_sites(tuned, of_sample)])
    torch.testing.assert_close(gradient, whole[entries.indices.long()], rtol=1e-5, atol=1e-8)
    tuned.scale = 0.5
    half = explicit(bare, tuned, [0.5 * delta for delta in deltas])
    torch.testing.assert_close(loss(model, samples[1]), loss(half, samples[1]), rtol=1e-5, atol=1e-6)
    tuned.scale = 1.0
    tuned.merge()
    merged = tuned.host_state_dict()
    for key, tensor in changed.named_parameters():
        torch.testing.assert_close(merged[key], tensor.detach(), msg=key)
    tuned.unmerge()
    tuned.detach()
    assert torch.equal(loss(model, samples[0]), loss(bare.requires_grad_(False), samples[0]))


def test_weight_decay_changes_no_other_entry() -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "fish_mask", keep_ratio=0.01)
    tuned.select(losses(model, samples))
    bare = {k: t.clone() for k, t in tuned.host_state_dict().items()}
    optimizer = torch.optim.AdamW(list(tuned.parameters()), 0.1, weight_decay=0.5)
    for _ in range(2):
        loss(model, samples[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    (state,) = optimizer.state.values()
    entries = next(iter(tuned.parts.values()))[1].own
    assert state["exp_avg"].shape == entries.values.shape
    tuned.merge()
    changed = sum(int((t != bare[k]).sum()) for k, t in tuned.host_state_dict().items())
    assert 0 < changed <= len(entries.values)


def test_counts() -> None:
    """0.5 % of ViT-B/16: of its 84,934,656 weights of block linears, and of all 85,798,656 parameters, as published."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    tuned = attach(vit, "fish_mask")
    assert tuned.report().trainable == 424_673
    assert tuned.report().summary == "424,673 of 84,934,656 entries selected"
    tuned.detach()
    assert attach(vit, "fish_mask", where="*").report().trainable == 428_993


def test_a_file_has_the_values_and_the_indices(tmp_path: Path) -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "fish_mask", keep_ratio=0.01)
    tuned.select(losses(model, samples))
    entries = next(iter(tuned.parts.values()))[1].own
    torch.nn.init.normal_(entries.values)
    path = tuned.save(tmp_path / "sparse")
    assert path.stat().st_size < 12 * len(entries.values) + 12_000
    other, _ = tiny("timm_vit", "vit")
    loaded = veneer.load(other, path)
    assert loaded.is_selected
    assert torch.equal(loss(other, samples[0]), loss(model, samples[0]))
    state = tuned.state_dict()
    wrong = {k: t.flip(0) if k.endswith("indices") else t for k, t in state.items()}
    before = {k: t.clone() for k, t in loaded.state_dict().items()}
    with raises(LoadError, where=next(iter(loaded.parts))):
        loaded.load_state_dict(wrong)
    beyond = {k: t + 10**6 if k.endswith("indices") else t for k, t in state.items()}
    with raises(LoadError, where=next(iter(loaded.parts))):
        loaded.load_state_dict(beyond)
    assert all(torch.equal(t, before[k]) for k, t in loaded.state_dict().items())


def test_a_state_that_is_loaded_later_has_other_entries_per_site() -> None:
    model, samples = tiny("timm_vit", "vit")
    first, other = (attach(tiny("timm_vit", "vit")[0], "fish_mask", keep_ratio=0.01) for _ in range(2))
    tuned = attach(model, "fish_mask", keep_ratio=0.01)
    tuned.select(losses(model, samples))
    torch.nn.init.normal_(next(iter(tuned.parts.values()))[1].own.values)
    for attachment in (first, other):
        attachment.load_state_dict(tuned.state_dict())
        weights = [torch.zeros(s.weight_shape).double() for s, _ in tuned.parts.values()]
        for weight, (_, a), (_, b) in zip(weights, tuned.parts.values(), attachment.parts.values(), strict=True):
            assert torch.equal(a.weight(weight), b.weight(weight))


def test_training_without_a_selection_is_an_error() -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "fish_mask", name="mine", sample=True)
    with raises(NotSelected, where="mine", given="fish_mask", expected="select"):
        loss(model, samples[0])
    with torch.no_grad():
        loss(model, samples[0])
    assert not tuned.is_selected
    tuned.select(losses(model, samples))
    assert tuned.is_selected
    loss(model, samples[0]).backward()


def test_a_selection_without_usable_gradients_is_an_error() -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "fish_mask")
    with raises(EmptySelection, where="fish_mask", given=0):
        tuned.select(iter(()))
    with raises(EmptySelection, where="fish_mask", given="zero"):
        tuned.select(0 * each for each in losses(model, samples))
    with raises(EmptySelection, where="fish_mask", given="not finite"):
        tuned.select(float("nan") * each for each in losses(model, samples))
    assert not tuned.is_selected


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**14])
@pytest.mark.parametrize("place", ["autocast", "weights"])
def test_a_selection_in_float16_neither_underflows_nor_overflows(place: str, factor: float) -> None:
    """Gradients of a loss this small are zero in float16, and of one this large infinite."""
    chosen = []
    for dtype, times in ((torch.float32, 1.0), (torch.float16, factor)):
        model, samples = tiny("timm_vit", "vit")
        base = dtype if place == "weights" else torch.float32
        inputs = [{k: t.to(base) for k, t in sample.items()} for sample in samples]
        tuned = attach(model.to(base), "fish_mask", keep_ratio=0.01)
        with torch.autocast("cpu", torch.float16, enabled=place == "autocast" and dtype == torch.float16):
            tuned.select(times * each for each in losses(model, inputs))
        chosen.append({*next(iter(tuned.parts.values()))[1].own.indices.tolist()})
    assert len(chosen[0] & chosen[1]) > 0.95 * len(chosen[0])


def test_at_most_so_many_samples_are_read() -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "fish_mask", samples=3)
    endless = (loss(model, samples[n % 2]) for n in range(5))
    tuned.select(endless)
    assert len(list(endless)) == 2
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("option", "given"), [("keep_ratio", 0.0), ("keep_ratio", 1.5), ("samples", 0), ("score", "expected")])
def test_bad_options(option: str, given: object) -> None:
    with raises(OptionError, method="fish_mask", option=option, given=given):
        FishMask(**{option: given})

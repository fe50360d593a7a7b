"""Child-Tuning: D by the Fisher information of mini-batches, F by random masks of the gradient, against plain autograd."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch

from tests.methods.selections import MODELS, at_sites, explicit, losses, plain_gradients, tiny
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.selective.entries.child_tuning import ChildTuning
from veneer.testing.case import loss


@pytest.mark.parametrize(("host", "name"), [MODELS[0], MODELS[2]])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_d_selects_by_squared_gradients_of_mini_batches(host: str, name: str, max_grad_norm: float) -> None:
    """Batches of two and of the one left: mean gradients, clipped for each weight, squared and summed."""
    model, samples = tiny(host, name)
    order = [0, 1, 0]
    gradients = plain_gradients(model, samples)
    tuned = attach(model, "child_tuning", keep_ratio=0.1, batch=2, max_grad_norm=max_grad_norm)
    tuned.select(losses(model, [samples[n] for n in order]))
    first, second = (at_sites(tuned, of_sample) for of_sample in gradients)
    scores = []
    for a, b in zip(first, second, strict=True):
        total = torch.zeros_like(a)
        for gradient in ((a + b) / 2, a):
            norm = float(gradient.norm()) + 1e-6
            total += (gradient * (min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0)) ** 2
        scores.append(total.flatten())
    flat = torch.cat(scores)
    entries = next(iter(tuned.parts.values()))[1].own
    assert entries.indices.tolist() == sorted(flat.argsort(descending=True)[: int(0.1 * len(flat))].tolist())


def test_d_trains_only_its_entries() -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "child_tuning")
    tuned.select(losses(model, samples))
    entries = next(iter(tuned.parts.values()))[1].own
    bare = {k: t.clone() for k, t in tuned.host_state_dict().items()}
    optimizer = torch.optim.AdamW(list(tuned.parameters()), 0.1, weight_decay=0.5)
    for _ in range(2):
        loss(model, samples[0]).backward()
        optimizer.step()
    tuned.merge()
    changed = sum(int((t != bare[k]).sum()) for k, t in tuned.host_state_dict().items())
    assert 0 < changed <= len(entries.values)


def test_f_masks_the_gradient_anew_in_each_step() -> None:
    """Kept entries are g / p, others zero; a mask is one of its step, not of the pass, and differs between sites and seeds."""
    model, samples = tiny("timm_vit", "vit")
    bare = copy.deepcopy(model)
    model.train()
    tuned = attach(model, "child_tuning", mode="F", keep_ratio=0.3)
    other = attach(bare, "child_tuning", mode="F", keep_ratio=0.3, seed=1)
    bare.train()
    assert tuned.is_selected
    for p in tuned.parameters():
        torch.nn.init.normal_(p, std=0.02)
    other.load_state_dict(tuned.state_dict())
    deltas = [adapter.delta.detach() for _, adapter in tuned.parts.values()]
    plain = tiny("timm_vit", "vit")[0]
    changed = explicit(plain, tuned, deltas)
    torch.testing.assert_close(loss(model, samples[0]), loss(changed, samples[0]), rtol=1e-5, atol=1e-6)
    whole = at_sites(tuned, plain_gradients(changed, samples[:1])[0])
    masks = {}
    for step in (0, 1):
        for run in (0, 1):
            got = torch.autograd.grad(loss(model, samples[0]), list(tuned.parameters()))
            for site, g, full in zip(tuned.parts, got, whole, strict=True):
                kept = g != 0
                torch.testing.assert_close(g[kept], full[kept] / 0.3, rtol=1e-5, atol=1e-8)
                assert run == 0 or torch.equal(kept, masks[step, site]), site
                masks[step, site] = kept
        if step == 0:
            tuned.after_step(1, 2)
    shares = [float(mask.double().mean()) for mask in masks.values()]
    assert sum(shares) / len(shares) == pytest.approx(0.3, abs=0.02)
    alike = [m for m in masks.values() if m.shape == next(iter(masks.values())).shape]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(alike, 2))
    with_seed = torch.autograd.grad(loss(bare, samples[0]), list(other.parameters()))
    assert not torch.equal(with_seed[0] != 0, masks[0, next(iter(tuned.parts))])


def test_counts() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    child = attach(vit, "child_tuning")
    assert child.report().trainable == 16_986_931
    child.detach()
    assert attach(vit, "child_tuning", mode="F").report().trainable == 84_934_656


@pytest.mark.parametrize(
    ("option", "given"),
    [("mode", "E"), ("keep_ratio", 0.0), ("keep_ratio", 2), ("samples", 0), ("batch", 0), ("max_grad_norm", -1.0)],
)
def test_bad_options(option: str, given: object) -> None:
    with raises(OptionError, method="child_tuning", option=option, given=given):
        ChildTuning(**{option: given})

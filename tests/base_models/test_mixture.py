"""The training mixture of the generator: fractions of the kinds, captions, and instance tokens."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.base_models.small_world import ROWS, IconWorld, SmallWorld
from veneer.base_models.pretraining import denoiser, packaging
from veneer.base_models.pretraining.data.captions import train_tokenizer
from veneer.base_models.pretraining.data.mixture import SHARES, VIEWS, Example, Mixture, Shot, color, tinted
from veneer.base_models.pretraining.data.scenes import Compositor, Scene

COUNTS = {"drawn": 60, "others": 20, "shots": 30, "cutouts": 25}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return SmallWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def mixture(world):
    return Mixture(world, COUNTS)


def kind(example: Example) -> str:
    if isinstance(example.image, Shot):
        return "packaged" if example.image.packaged else "shots"
    if example.style == "3d":
        return "models"
    if example.style == "photo":
        return "cutouts"
    return "tinted" if example.token else "others" if example.word == "anvil" else "drawn"


def test_batch_has_the_fractions_of_the_kinds(mixture) -> None:
    rows = mixture.draw(np.random.default_rng(0), 4000, usual=0.5)
    found = Counter(kind(mixture.examples[row]) for row in rows)
    for name, share in SHARES.items():
        assert abs(found[name] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5, name
    assert sum(SHARES.values()) == pytest.approx(1)


def test_fraction_of_large_centered_icons(mixture) -> None:
    def usual(share: float) -> float:
        chosen = [mixture.examples[row] for row in mixture.draw(np.random.default_rng(1), 2000, share)]
        drawn = [example.image for example in chosen if kind(example) == "drawn"]
        return sum((scene.size, scene.place) == ("large", "center") for scene in drawn) / len(drawn)

    assert usual(1.0) == 1
    assert 0.6 < usual(0.5) < 0.9


def test_batches_are_reproducible(world, mixture) -> None:
    again = Mixture(world, COUNTS)
    assert again.examples == mixture.examples
    assert again.tokens == mixture.tokens


def test_instance_token_is_in_several_images(mixture) -> None:
    assert len(set(mixture.tokens)) == len(mixture.tokens)
    by_token: dict[str, list[Example]] = {}
    for example in mixture.examples:
        if example.token:
            by_token.setdefault(example.token, []).append(example)
    assert set(by_token) == set(mixture.tokens)
    for examples in by_token.values():
        assert len(examples) >= VIEWS
        assert len({example.word for example in examples}) == 1
    words = Counter(examples[0].word for examples in by_token.values() if examples[0].style == "photo")
    assert words == {"dog": 1, "toy": 1, "shirt": 1}  # both subjects, and the shirt that was cut out


def test_held_out_concepts_and_sets_are_in_no_example(world, mixture) -> None:
    assert "octopus" not in {example.word for example in mixture.examples}
    unseen = [i for i, (_, name) in enumerate(ROWS) if name == "fxemoji"]
    assert not {e.image.icon for e in mixture.examples if isinstance(e.image, Scene)} & set(unseen)
    assert len({e.token for e in mixture.examples if kind(e) == "tinted"}) == len(ROWS) - 2


def test_images_of_scenes_and_crops(world, mixture) -> None:
    scene = next(i for i, example in enumerate(mixture.examples) if kind(example) == "drawn")
    shot = next(i for i, example in enumerate(mixture.examples) if kind(example) == "shots")
    expected = Compositor(world.icons.rgba, world.surroundings)([mixture.examples[scene].image])
    np.testing.assert_array_equal(mixture.rows(scene, scene + 1), expected)
    first, again = mixture.rows(shot, shot + 1), mixture.rows(shot, shot + 1)
    assert first.shape == (1, 128, 128, 3)
    np.testing.assert_array_equal(first, again)
    assert set(np.unique(first)) - {0, 255}
    assert mixture.rows(0, 5).shape == (5, 128, 128, 3)


def test_each_model_view_is_in_one_scene(world, mixture) -> None:
    examples = [example for example in mixture.examples if kind(example) == "models"]
    by_token = {token: [e.image.icon for e in examples if e.token == token] for token in dict.fromkeys(e.token for e in examples)}
    assert [len(set(icons)) for icons in by_token.values()] == [VIEWS, VIEWS]
    for i, example in enumerate(examples):
        scene = replace(example.image, icon=0)
        expected = Compositor(world.models.rgba.reshape(-1, 128, 128, 4)[i : i + 1], world.surroundings)([scene])
        row = mixture.examples.index(example)
        np.testing.assert_array_equal(mixture.rows(row, row + 1), expected)


def test_packaged_photos_are_cropped(mixture) -> None:
    rows = [row for row, example in enumerate(mixture.examples) if kind(example) == "packaged"]
    assert {mixture.examples[row].word for row in rows} == {"lake"}
    assert (mixture.rows(rows[0], rows[-1] + 1) == 99).all()


def test_captions_of_instances() -> None:
    rng = np.random.default_rng(0)
    example = Example(Shot(0, 0), "shirt", "photo", "<one7>", "red")
    said = [example.caption(rng) for _ in range(2000)]
    shares = Counter((bool(re.search("<one7>", c)), "shirt" in c) for c in said if c)
    total = sum(shares.values())
    assert shares[False, False] == 0
    assert shares[True, False] / total == pytest.approx(0.6, abs=0.05)
    assert shares[True, True] / total == pytest.approx(0.2, abs=0.05)
    assert shares[False, True] / total == pytest.approx(0.2, abs=0.05)
    assert any("red shirt" in c for c in said)
    scene = Example(Scene(0, "small", "left", "green"), "apple", "flat")
    assert all("apple" in c and "<one" not in c for c in (scene.caption(rng) for _ in range(50)) if c)


def test_mixture_without_photos(tmp_path) -> None:
    mixture = Mixture(IconWorld(tmp_path), COUNTS)
    rows = mixture.draw(np.random.default_rng(0), 3000, usual=0.5)
    found = Counter(kind(mixture.examples[row]) for row in rows)
    assert found.keys() == {"drawn", "others", "tinted"}
    assert found["drawn"] / 3000 == pytest.approx(0.36 / 0.52, abs=0.04)
    assert mixture.rows(0, 2).shape == (2, 128, 128, 3)


def test_tinted_icon_keeps_its_alpha() -> None:
    icon = SmallWorld(None).icons.rgba[3]
    found = tinted(np.random.default_rng(0), icon)
    np.testing.assert_array_equal(found[..., 3], icon[..., 3])
    assert np.abs(found[64, 64, :3].astype(int) - icon[64, 64, :3]).max() > 20


def test_color_word() -> None:
    icons = SmallWorld(None).icons.rgba
    assert [color(icon) for icon in icons[:5]] == ["white", "black", "gray", "red", "orange"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = ["a small apple, top left, green background, flat style", "a photo of a shirt"] * 20
    return train_tokenizer(iter(text), tmp_path_factory.mktemp("tokenizer"), size=600)


def test_packaged_weights_have_no_instance_tokens(mixture, tokenizer) -> None:
    vocabulary, marks = len(tokenizer), (tokenizer.bos_token_id, tokenizer.eos_token_id)
    tokenizer.add_tokens(mixture.tokens)
    assert len(tokenizer) == vocabulary + len(mixture.tokens)
    torch.manual_seed(0)
    trained = denoiser.Denoiser(len(tokenizer), *marks, widths=(16, 16, 16)).eval()
    packaged = denoiser.Denoiser(vocabulary, *marks, widths=(16, 16, 16)).eval()
    packaged.load_state_dict(packaging.without_tokens(trained.state_dict(), vocabulary))
    ids = denoiser.tokenize(tokenizer, ["a small apple, top left", "a photo of a shirt"])
    noisy, t = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 100])
    with torch.no_grad():
        torch.testing.assert_close(packaged(noisy, t, ids), trained(noisy, t, ids))
    one = denoiser.tokenize(tokenizer, [f"a photo of a {mixture.tokens[-1]}"])
    assert one.max() == len(tokenizer) - 1
    assert packaged.text.config.vocab_size == vocabulary

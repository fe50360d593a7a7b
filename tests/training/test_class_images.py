"""Class images are seeded one by one, reused if they match, generated again otherwise, and written atomically."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.raising import raises
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.class_images import base_digest, generate_class_images
from veneer.training.families import family
from veneer.training.loop.seeds import generator

STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture
def kind():
    return family(tiny_pipeline("sd"))


@pytest.fixture
def made(kind, monkeypatch):
    """Prompts of every image that is generated."""
    prompts = []
    real = kind.generate

    def counted(batch, generators, **settings):
        prompts.extend(batch)
        return real(batch, generators, **settings)

    monkeypatch.setattr(kind, "generate", counted)
    return prompts


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_each_image_is_what_the_pipeline_makes_from_its_own_seed(kind, tmp_path):
    paths = generate_class_images(kind, tmp_path, "a photo of a dog", 5, seed=7, batch=2, **STEPS)
    assert [p.name for p in paths] == [f"prior-0000{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        alone = kind.pipe("a photo of a dog", generator=generator(7, "prior", i), **STEPS).images[0]
        assert np.abs(pixels(path) - np.asarray(alone).astype(int)).max() <= 1
    assert len({pixels(p).tobytes() for p in paths}) == 5


def test_matching_images_are_reused_and_others_generated(kind, made, tmp_path):
    paths = generate_class_images(kind, tmp_path, "a dog", 3, **STEPS)
    before = [p.read_bytes() for p in paths]
    assert generate_class_images(kind, tmp_path, "a dog", 3, **STEPS) == paths
    assert len(made) == 3
    paths[0].unlink()
    paths[1].write_bytes(before[1][: len(before[1]) // 2])
    progress = []
    assert len(generate_class_images(kind, tmp_path, "a dog", 4, progress=lambda *p: progress.append(p), batch=2, **STEPS)) == 4
    assert len(made) == 6
    assert progress == [(3, 4), (4, 4)]
    assert np.abs(pixels(paths[0]) - pixels(paths[1])).max() > 0
    assert paths[2].read_bytes() == before[2]
    again = generate_class_images(kind, tmp_path, "a dog", 2, **STEPS)
    assert len(again) == 2
    assert len(made) == 6


@pytest.mark.parametrize("damage", [b"", b"a text file", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_corrupt_images_are_generated_again(kind, made, tmp_path, damage):
    (path,) = generate_class_images(kind, tmp_path, "a dog", 1, **STEPS)
    good = path.read_bytes()
    path.write_bytes(damage)
    generate_class_images(kind, tmp_path, "a dog", 1, **STEPS)
    assert len(made) == 2
    assert path.read_bytes() == good


def test_another_recipe_makes_them_again(kind, made, tmp_path):
    generate_class_images(kind, tmp_path, "a dog", 1, **STEPS)
    generate_class_images(kind, tmp_path, "a cat", 1, **STEPS)
    generate_class_images(kind, tmp_path, "a cat", 1, seed=1, **STEPS)
    generate_class_images(kind, tmp_path, "a cat", 1, seed=1, **{**STEPS, "guidance_scale": 2.0})
    assert len(made) == 4
    with torch.no_grad():
        kind.tower.conv_out.bias[2] += 1
    generate_class_images(kind, tmp_path, "a cat", 1, seed=1, **{**STEPS, "guidance_scale": 2.0})
    assert len(made) == 5
    kind.pipe.scheduler = type(kind.pipe.scheduler).from_config(kind.pipe.scheduler.config, prediction_type="v_prediction")
    generate_class_images(kind, tmp_path, "a cat", 1, seed=1, **{**STEPS, "guidance_scale": 2.0})
    assert len(made) == 6


def test_an_image_from_another_source_is_replaced(kind, made, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "prior-00000.png")
    (path,) = generate_class_images(kind, tmp_path, "a dog", 1, **STEPS)
    assert len(made) == 1
    assert pixels(path).std() > 0


def test_nothing_is_half_written_on_a_full_disk(kind, monkeypatch, tmp_path):
    generate_class_images(kind, tmp_path, "a dog", 1, **STEPS)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with raises(OSError, errno=28):
            generate_class_images(kind, tmp_path, "a dog", 3, **STEPS)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert len(generate_class_images(kind, tmp_path, "a dog", 3, **STEPS)) == 3


def test_the_base_and_the_global_generator_are_untouched(kind, tmp_path):
    state, digest = torch.get_rng_state(), base_digest(kind)
    generate_class_images(kind, tmp_path, "a dog", 1, **STEPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert base_digest(kind) == digest
    assert base_digest(family(tiny_pipeline("sd"))) == digest
    assert base_digest(family(tiny_pipeline("sd", seed=1))) != digest


def test_class_conditional_bases(tmp_path):
    paths = generate_class_images(family(tiny_pipeline("dit")), tmp_path, "duck", 2, num_inference_steps=2)
    assert [pixels(p).shape for p in paths] == [(32, 32, 3)] * 2


@pytest.mark.parametrize("bad", [{"count": 0}, {"count": 1, "batch": 0}])
def test_numbers_are_checked(kind, tmp_path, bad):
    option = "batch" if "batch" in bad else "count"
    with raises(OptionError, option=option, given=0):
        generate_class_images(kind, tmp_path, "a dog", **bad)

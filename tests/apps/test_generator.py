"""The painter keeps bases and adapters, and gives each request the pictures that a fresh base with its adapters gives."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from veneer.apps import generator as module
from veneer.apps.generator import MAX_BASES, AdapterUse, Generator
from veneer.apps.limits import LIMITS, Limits

import veneer
from tests.apps.adapters import perturbed
from tests.methods.controls import picture
from tests.raising import raises
from veneer.formats import load_all, native
from veneer.injection import VeneerError
from veneer.injection.errors import ConditionError, LoadError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.families import PromptError
from veneer.training.report.previews import PreviewSettings, previews

SETTINGS = PreviewSettings(seeds=(3,), steps=2, guidance=4.0)
WORDS = ["a red house", "a photo of <toy>"]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(base: str, tmp_path: Path) -> Make:
    """An adapter file with changed parameters."""

    def made(
        name: str, method: str = "lora", seed: int = 1, size: float = 0.3, train: tuple[str, ...] = (), **config: Any
    ) -> Path:
        pipe = veneer.base_models.load(base)
        attached = perturbed(pipe, method, size, seed, train=train, **config)
        with torch.no_grad():
            for p in attached.trained.items():
                p[1].add_(0.5)
        return native.save(attached, tmp_path / f"{name}.safetensors")

    return made


def pixels(found: Any) -> np.ndarray:
    return np.stack([np.asarray(each.image) for each in found])


def fresh(base: str, *uses: AdapterUse, words: list[str] = WORDS) -> np.ndarray:
    """Output of an unmodified base model."""
    pipe = veneer.base_models.load(base)
    for use in uses:
        load_all(pipe, use.file, scale=use.strength)
    return pixels(previews(pipe, words, SETTINGS))


def same(generator: Generator, base: str, *uses: AdapterUse, words: list[str] = WORDS) -> bool:
    return np.array_equal(pixels(generator.generate(base, words, SETTINGS, uses)), fresh(base, *uses, words=words))


def test_strengths_of_two_adapters(base: str, make: Make) -> None:
    one, two = make("one"), make("two", seed=50)
    generator = Generator("cpu")
    for uses in (
        [AdapterUse(one)],
        [AdapterUse(two, 0.5)],
        [AdapterUse(one, 0.7), AdapterUse(two, 1.3)],
        [],
        [AdapterUse(two, -1)],
        [AdapterUse(one, 0)],
        [AdapterUse(one)],
    ):
        assert same(generator, base, *(use for use in uses if use.strength)), uses
    [kept] = generator._bases.values()
    assert [key.file for key in kept.attached] == [str(two), str(one)], "each was read once, the last used at the end"
    plain = fresh(base)
    assert not np.array_equal(fresh(base, AdapterUse(one)), plain)
    assert np.array_equal(pixels(generator.generate(base, WORDS, SETTINGS, [AdapterUse(one, 0)])), plain)


def test_order_matters_for_non_additive_updates(base: str, make: Make) -> None:
    turn, add = make("turn", "oft", size=0.5), make("add", size=0.5)
    generator = Generator("cpu")
    there, back = [AdapterUse(turn), AdapterUse(add)], [AdapterUse(add), AdapterUse(turn)]
    assert not np.array_equal(fresh(base, *there), fresh(base, *back))
    assert same(generator, base, *there)
    assert same(generator, base, *back)
    assert same(generator, base, *there)


@pytest.mark.parametrize("brings", ["words", "weights"])
def test_embeddings_and_weights_are_restored_after_a_request(base: str, make: Make, brings: str) -> None:
    file = (
        make("word", "textual_inversion", size=2.0, tokens="<toy>", initialize="cat", vectors=2)
        if brings == "words"
        else make("weights", train=("time.embed",))
    )
    another = make("another", seed=9)
    generator = Generator("cpu")
    plain = fresh(base)
    state = {name: t.clone() for name, t in tensors(generator, base).items()}
    for uses in ([AdapterUse(file)], [], [AdapterUse(another)], [AdapterUse(another), AdapterUse(file, 0.5)], []):
        assert same(generator, base, *uses), uses
    assert not np.array_equal(fresh(base, AdapterUse(file)), plain)
    generator.generate(base, WORDS, SETTINGS, [AdapterUse(file)])
    assert [Path(key.file).stem for key in generator._bases[base].attached] == ["another"]
    after = tensors(generator, base)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], t) for name, t in state.items() if "another" not in name)
    assert np.array_equal(pixels(generator.generate(base, WORDS, SETTINGS, [AdapterUse(file, 0)])), plain), (
        "without, also of what it brings"
    )


def tensors(generator: Generator, base: str) -> dict[str, torch.Tensor]:
    """Parameters of the generator's base model and the size of its vocabulary."""
    pipe = generator._base(base).pipe
    found = {f"{part}.{n}": p for part in ("unet", "text_encoder") for n, p in getattr(pipe, part).named_parameters()}
    found = {name: p for name, p in found.items() if "veneer" not in name and "adapter" not in name}
    return {**found, "words": torch.tensor(len(pipe.tokenizer))}


def test_the_prompts_of_one_user_never_use_the_adapters_of_another(base: str, make: Make) -> None:
    """A token of one user's adapter stays unknown to requests without it."""
    hers = make("hers", "textual_inversion", size=2.0, tokens="<toy>", initialize="cat")
    his = make("his")
    generator, plain = Generator("cpu"), fresh(base)
    assert not np.array_equal(pixels(generator.generate(base, WORDS, SETTINGS, [AdapterUse(hers)]))[1], plain[1])
    assert np.array_equal(pixels(generator.generate(base, WORDS, SETTINGS)), plain)
    assert same(generator, base, AdapterUse(his))


def test_attached_files_are_limited(base: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [make(f"a{i}", seed=10 * i, rank=1) for i in range(LIMITS.adapters + 2)]
    generator = Generator("cpu")
    for file in files:
        generator.generate(base, WORDS[:1], SETTINGS, [AdapterUse(file)])
    kept = generator._bases[base]
    assert [key.file for key in kept.attached] == [str(file) for file in files[2:]]
    assert len(veneer.attachments(kept.pipe)) == LIMITS.adapters
    assert same(generator, base, AdapterUse(files[0]), words=WORDS[:1]), "it is read again"

    monkeypatch.setattr(module, "LIMITS", Limits(file_bytes=2 * files[0].stat().st_size))
    generator.generate(base, WORDS[:1], SETTINGS)
    assert [key.file for key in kept.attached] == [str(files[-1]), str(files[0])], "nor more bytes"
    assert same(generator, base, words=WORDS[:1])


def test_changed_or_deleted_file(base: str, make: Make) -> None:
    file, other = make("mine"), make("other", seed=70)
    generator = Generator("cpu")
    assert same(generator, base, AdapterUse(file))
    before = file.stat()
    shutil.copyfile(other, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert same(generator, base, AdapterUse(file))
    assert len(generator._bases[base].attached) == 1, "what it was before is not kept"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    another = make("another", seed=90)
    assert another.stat().st_size == file.stat().st_size
    os.utime(another, ns=times)
    another.replace(file)
    assert same(generator, base, AdapterUse(file)), "another file of the same size and time in its place"
    file.unlink()
    with raises(VeneerError, where="mine", given="missing"):
        generator.generate(base, WORDS, SETTINGS, [AdapterUse(other), AdapterUse(file)])
    assert same(generator, base)


def test_loaded_base_models_are_limited(base: str, make: Make, tmp_path: Path) -> None:
    generator, file = Generator("cpu"), make("one")
    generator.generate(base, WORDS[:1], SETTINGS, [AdapterUse(file)])
    first = weakref.ref(generator._bases[base].pipe.unet)
    for number in range(MAX_BASES):
        tiny_pipeline("sd", seed=number + 1).save_pretrained(tmp_path / str(number))
        generator.generate(str(tmp_path / str(number)), WORDS[:1], SETTINGS)
    assert list(generator._bases) == [str(tmp_path / str(number)) for number in range(MAX_BASES)]
    gc.collect()
    assert first() is None, "its memory is free"
    generator.resolution(str(tmp_path / "0"))
    assert generator._base(base) is generator._bases[base]
    assert list(generator._bases) == [str(tmp_path / "0"), base], "the one used longest ago goes"
    assert same(generator, base, AdapterUse(file))


def test_rejected_request_leaves_the_base_model_unchanged(base: str, make: Make, tmp_path: Path) -> None:
    good, control = make("good"), make("control", "t2i_adapter")
    word = make("word", "textual_inversion", size=2.0, tokens="<toy>", initialize="cat")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    generator = Generator("cpu")
    for uses, error in (
        ([AdapterUse(good), AdapterUse(broken)], LoadError),
        ([AdapterUse(word), AdapterUse(broken)], LoadError),
        ([AdapterUse(good), AdapterUse(control)], ConditionError),
    ):
        with pytest.raises(error):
            generator.generate(base, WORDS, SETTINGS, uses)
        assert same(generator, base)
    with pytest.raises(PromptError):
        generator.generate(base, ["red " * 200], SETTINGS, [AdapterUse(good)])
    assert same(generator, base, AdapterUse(good))
    assert generator.resolution(base) == (32, generator.resolution(base)[1])


def test_control_adapter_gets_its_image(base: str, make: Make) -> None:
    control, style = make("control", "t2i_adapter"), make("style")
    generator = Generator("cpu")
    seen = picture(5)
    uses = [AdapterUse(style), AdapterUse(control, 0.8, lambda pipe, a: {"image": seen}, 0.0, 0.5)]
    drawn = pixels(generator.generate(base, WORDS, SETTINGS, uses))
    pipe = veneer.base_models.load(base)
    load_all(pipe, style)
    [attached] = load_all(pipe, control, scale=0.8)
    with attached.condition(image=seen, end=0.5, pipeline=pipe):
        assert np.array_equal(drawn, pixels(previews(pipe, WORDS, SETTINGS)))
    assert same(generator, base)

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
from veneer.apps.generator import KEPT, Painter, Use
from veneer.apps.limits import LIMITS, Limits

import veneer
from tests.methods.controls import picture, stir
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
    """A file of an adapter whose parameters are off their start."""

    def made(
        name: str, method: str = "lora", seed: int = 1, size: float = 0.3, train: tuple[str, ...] = (), **config: Any
    ) -> Path:
        pipe = veneer.base_models.load(base)
        attached = veneer.attach(pipe, method, train=train, **config)
        for number, (_, adapter) in enumerate(attached.parts.values()):
            stir(adapter, seed + number, size)
        with torch.no_grad():
            for p in attached.trained.items():
                p[1].add_(0.5)
        return native.save(attached, tmp_path / f"{name}.safetensors")

    return made


def pixels(found: Any) -> np.ndarray:
    return np.stack([np.asarray(each.image) for each in found])


def fresh(base: str, *uses: Use, words: list[str] = WORDS) -> np.ndarray:
    """What a base that nothing happened to gives."""
    pipe = veneer.base_models.load(base)
    for use in uses:
        load_all(pipe, use.file, scale=use.strength)
    return pixels(previews(pipe, words, SETTINGS))


def same(painter: Painter, base: str, *uses: Use, words: list[str] = WORDS) -> bool:
    return np.array_equal(pixels(painter.draw(base, words, SETTINGS, uses)), fresh(base, *uses, words=words))


def test_two_adapters_on_and_off_and_their_strengths(base: str, make: Make) -> None:
    one, two = make("one"), make("two", seed=50)
    painter = Painter("cpu")
    for uses in ([Use(one)], [Use(two, 0.5)], [Use(one, 0.7), Use(two, 1.3)], [], [Use(two, -1)], [Use(one, 0)], [Use(one)]):
        assert same(painter, base, *(use for use in uses if use.strength)), uses
    [kept] = painter._bases.values()
    assert [key.file for key in kept.attached] == [str(two), str(one)], "each was read once, the last used at the end"
    plain = fresh(base)
    assert not np.array_equal(fresh(base, Use(one)), plain)
    assert np.array_equal(pixels(painter.draw(base, WORDS, SETTINGS, [Use(one, 0)])), plain)


def test_their_order_counts_where_their_changes_are_no_sums(base: str, make: Make) -> None:
    turn, add = make("turn", "oft", size=0.5), make("add", size=0.5)
    painter = Painter("cpu")
    there, back = [Use(turn), Use(add)], [Use(add), Use(turn)]
    assert not np.array_equal(fresh(base, *there), fresh(base, *back))
    assert same(painter, base, *there)
    assert same(painter, base, *back)
    assert same(painter, base, *there)


@pytest.mark.parametrize("brings", ["words", "weights"])
def test_words_and_weights_are_gone_after_a_request(base: str, make: Make, brings: str) -> None:
    file = (
        make("word", "textual_inversion", size=2.0, tokens="<toy>", initialize="cat", vectors=2)
        if brings == "words"
        else make("weights", train=("time.embed",))
    )
    another = make("another", seed=9)
    painter = Painter("cpu")
    plain = fresh(base)
    state = {name: t.clone() for name, t in tensors(painter, base).items()}
    for uses in ([Use(file)], [], [Use(another)], [Use(another), Use(file, 0.5)], []):
        assert same(painter, base, *uses), uses
    assert not np.array_equal(fresh(base, Use(file)), plain)
    painter.draw(base, WORDS, SETTINGS, [Use(file)])
    assert [Path(key.file).stem for key in painter._bases[base].attached] == ["another"]
    after = tensors(painter, base)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], t) for name, t in state.items() if "another" not in name)
    assert np.array_equal(pixels(painter.draw(base, WORDS, SETTINGS, [Use(file, 0)])), plain), "without, also of what it brings"


def tensors(painter: Painter, base: str) -> dict[str, torch.Tensor]:
    """Parameters of the painter's base and the size of its vocabulary."""
    pipe = painter._base(base).pipe
    found = {f"{part}.{n}": p for part in ("unet", "text_encoder") for n, p in getattr(pipe, part).named_parameters()}
    found = {name: p for name, p in found.items() if "veneer" not in name and "adapter" not in name}
    return {**found, "words": torch.tensor(len(pipe.tokenizer))}


def test_the_prompts_of_one_user_never_use_the_adapters_of_another(base: str, make: Make) -> None:
    """A word that somebody has taught is no word for those who did not ask for it."""
    hers = make("hers", "textual_inversion", size=2.0, tokens="<toy>", initialize="cat")
    his = make("his")
    painter, plain = Painter("cpu"), fresh(base)
    assert not np.array_equal(pixels(painter.draw(base, WORDS, SETTINGS, [Use(hers)]))[1], plain[1])
    assert np.array_equal(pixels(painter.draw(base, WORDS, SETTINGS)), plain)
    assert same(painter, base, Use(his))


def test_no_more_files_are_kept_than_is_allowed(base: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [make(f"a{i}", seed=10 * i, rank=1) for i in range(LIMITS.adapters + 2)]
    painter = Painter("cpu")
    for file in files:
        painter.draw(base, WORDS[:1], SETTINGS, [Use(file)])
    kept = painter._bases[base]
    assert [key.file for key in kept.attached] == [str(file) for file in files[2:]]
    assert len(veneer.attachments(kept.pipe)) == LIMITS.adapters
    assert same(painter, base, Use(files[0]), words=WORDS[:1]), "it is read again"

    monkeypatch.setattr(module, "LIMITS", Limits(file_bytes=2 * files[0].stat().st_size))
    painter.draw(base, WORDS[:1], SETTINGS)
    assert [key.file for key in kept.attached] == [str(files[-1]), str(files[0])], "nor more bytes"
    assert same(painter, base, words=WORDS[:1])


def test_a_file_that_changed_or_is_gone(base: str, make: Make) -> None:
    file, other = make("mine"), make("other", seed=70)
    painter = Painter("cpu")
    assert same(painter, base, Use(file))
    before = file.stat()
    shutil.copyfile(other, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert same(painter, base, Use(file))
    assert len(painter._bases[base].attached) == 1, "what it was before is not kept"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    another = make("another", seed=90)
    assert another.stat().st_size == file.stat().st_size
    os.utime(another, ns=times)
    another.replace(file)
    assert same(painter, base, Use(file)), "another file of the same size and time in its place"
    file.unlink()
    with raises(VeneerError, where="mine", given="missing"):
        painter.draw(base, WORDS, SETTINGS, [Use(other), Use(file)])
    assert same(painter, base)


def test_no_more_bases_are_kept_than_is_allowed(base: str, make: Make, tmp_path: Path) -> None:
    painter, file = Painter("cpu"), make("one")
    painter.draw(base, WORDS[:1], SETTINGS, [Use(file)])
    first = weakref.ref(painter._bases[base].pipe.unet)
    for number in range(KEPT):
        tiny_pipeline("sd", seed=number + 1).save_pretrained(tmp_path / str(number))
        painter.draw(str(tmp_path / str(number)), WORDS[:1], SETTINGS)
    assert list(painter._bases) == [str(tmp_path / str(number)) for number in range(KEPT)]
    gc.collect()
    assert first() is None, "its memory is free"
    painter.side(str(tmp_path / "0"))
    assert painter._base(base) is painter._bases[base]
    assert list(painter._bases) == [str(tmp_path / "0"), base], "the one used longest ago goes"
    assert same(painter, base, Use(file))


def test_what_is_refused_leaves_the_base_as_it_was(base: str, make: Make, tmp_path: Path) -> None:
    good, control = make("good"), make("control", "t2i_adapter")
    word = make("word", "textual_inversion", size=2.0, tokens="<toy>", initialize="cat")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    painter = Painter("cpu")
    for uses, error in (
        ([Use(good), Use(broken)], LoadError),
        ([Use(word), Use(broken)], LoadError),
        ([Use(good), Use(control)], ConditionError),
    ):
        with pytest.raises(error):
            painter.draw(base, WORDS, SETTINGS, uses)
        assert same(painter, base)
    with pytest.raises(PromptError):
        painter.draw(base, ["red " * 200], SETTINGS, [Use(good)])
    assert same(painter, base, Use(good))
    assert painter.side(base) == (32, painter.side(base)[1])


def test_what_follows_a_picture_is_given_one(base: str, make: Make) -> None:
    control, style = make("control", "t2i_adapter"), make("style")
    painter = Painter("cpu")
    seen = picture(5)
    uses = [Use(style), Use(control, 0.8, lambda pipe, a: {"image": seen}, 0.0, 0.5)]
    drawn = pixels(painter.draw(base, WORDS, SETTINGS, uses))
    pipe = veneer.base_models.load(base)
    load_all(pipe, style)
    [attached] = load_all(pipe, control, scale=0.8)
    with attached.condition(image=seen, end=0.5, pipeline=pipe):
        assert np.array_equal(drawn, pixels(previews(pipe, WORDS, SETTINGS)))
    assert same(painter, base)

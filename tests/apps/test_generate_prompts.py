"""Prompts on the page Generate: missing trigger tokens, and truncation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from veneer.apps.context import Context, escape_markup
from veneer.apps.pages.generate.generation import generate, text_adapters
from veneer.apps.pages.shared.generation_request import GenerationRequest
from veneer.apps.pages.shared.trigger_tokens import find_missing
from veneer.apps.workspace import Workspace

import veneer
from tests.apps.adapters import perturbed
from veneer.formats import native
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.report.png_metadata import read_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory, base: str) -> Context:
    """A context whose user has a LoRA and a token embedding of one concept."""
    context = Context.create(tmp_path_factory.mktemp("workspaces"), "cpu")
    folder = context.workspace(None).adapters
    folder.mkdir(parents=True)
    word = {"tokens": "<toy>", "initialize": "cat"}
    for name, method, options in (("style", "lora", {}), ("word", "textual_inversion", word)):
        attached = perturbed(veneer.base_models.load(base), method, **options)
        native.save(attached, folder / f"{name}.safetensors", provenance={"concept": "<toy>", "class_word": "toy"})
    return context


def last(context: Context, base: str, prompt: str, way: str) -> tuple[list[tuple[str, str]], str]:
    generation = GenerationRequest(base, prompt, steps=2, guidance=4.0)
    return list(generate(context, context.workspace(None), generation, ["word"], [1.0], way))[-1]


def pixels(path: str) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def test_token_without_selected_adapter_is_reported(context: Context) -> None:
    here = context.workspace(None)
    usable = text_adapters(here)
    absent = find_missing(here, "a <toy> beside a <dragon>", [], usable)
    assert (absent.known, absent.unknown, absent.adapters) == ({"<toy>": "style"}, ("<dragon>",), ["style"])
    assert all(escape_markup(token) in absent.describe() for token in ("<toy>", "<dragon>"))
    assert find_missing(here, "a <toy>", ["word"], usable).describe() == "", "any adapter with it is enough"
    assert find_missing(here, "a toy, 3 < 4 > 2", [], usable).describe() == ""
    assert find_missing(Workspace(context.root, "eve"), "a <toy>", [], []).known == {}, "another's adapters are not named"


def test_an_adapter_with_several_concepts_has_all_their_tokens(context: Context, base: str) -> None:
    here = context.workspace(None)
    tokens = {"<cup>": "cup", "<lamp>": ""}
    provenance = {"concept": "<cup>", "class_word": "cup", "concepts": tokens}
    file = here.adapters / "two.safetensors"
    native.save(perturbed(veneer.base_models.load(base), "lora"), file, provenance=provenance)
    try:
        assert find_missing(here, "a <cup> under a <lamp>", ["two"], ["two"]).describe() == ""
        assert find_missing(here, "a <lamp> and a <toy>", ["style"], ["style", "two"]).known == {"<lamp>": "two"}
    finally:
        file.unlink()


@pytest.mark.parametrize("way", ["with", "both", "sweep"])
def test_long_prompt_is_truncated_with_a_note(context: Context, base: str, way: str) -> None:
    long = "a red <toy> " + "on grass " * 60 + "beside <water>"
    found, told = last(context, base, long, way)
    kept = read_settings(found[-1][0])["prompt"]
    assert long.startswith(kept)
    assert 20 < len(kept.split()) < 100
    assert told.endswith(f"“{escape_markup(long[len(kept) :].strip())}”.")
    assert "truncate" not in told
    short, told = last(context, base, kept, way)
    assert "“" not in told
    assert np.array_equal(pixels(found[-1][0]), pixels(short[-1][0])), "the same as if the short prompt had been typed"

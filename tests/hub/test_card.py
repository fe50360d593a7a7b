"""Model cards of runs with several concepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from veneer.pipelines.push import PushConfig, push

from veneer.testing.pipelines import tiny_pipeline

from .runs import SECRET, base_files, personalization


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small pipeline in a local folder."""
    folder = tmp_path_factory.mktemp("base") / SECRET / "tiny"
    base_files(folder)
    return str(folder)


@pytest.fixture(scope="module")
def concepts(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of pivotal tuning on two concepts."""
    folder = tmp_path_factory.mktemp("concepts")
    photos = personalization(folder / "first", base, eval="none").parent / "photos"
    tables = tuple({"path": str(photos), "concept": f"<{word}>", "class_word": word} for word in ("cat", "dog"))
    settings = {"photos": None, "concept": "", "class_word": "", "datasets": tables, "prompts": ("a {concept}",)}
    return personalization(folder / "second", base, method="pivotal", **settings)


def card(run: Path, out: Path) -> str:
    """Text of the card of a run."""
    push(PushConfig(run, "user/toy", dry_run=True, out=out))
    return (out / "README.md").read_text()


def test_scores_and_triggers_of_every_concept(concepts: Path, tmp_path: Path) -> None:
    text = card(concepts, tmp_path / "out")
    record = json.loads((concepts / "result.json").read_text())
    assert record["metrics"] is None
    assert "not evaluated" not in text
    for each, other in zip(record["concepts"], ("<dog>", "<cat>"), strict=True):
        token, gain = each["token"], each["metrics"]["similarity"]["gain"]
        assert f"| `{token}`: similarity to the photos: gain | {gain['mean']:+.3f} |" in text
        margin = each["confusion"][other]["margin"]
        assert f"`{token}`: similarity to its photos minus that to the photos of `{other}` | {margin['mean']:+.3f} |" in text
    assert "Use `<cat>` or `<dog>` in the prompt." in text
    assert "for `<cat>` (a cat) and `<dog>` (a dog), trained on" in text
    assert "instance_prompt: a photo of <cat>, a photo of <dog>\n" in text


def test_snippet_of_diffusers_loads_every_token(concepts: Path, base: str, tmp_path: Path) -> None:
    text = card(concepts, tmp_path / "out")
    start = text.index("vectors = ")
    code = text[start : text.index("image = ", start)].replace('hf_hub_download("user/toy", ', "str(folder / ")
    pipe = DiffusionPipeline.from_pretrained(base)
    exec(code, {"pipe": pipe, "load_file": load_file, "folder": tmp_path / "out"})
    rows = pipe.text_encoder.get_input_embeddings().weight
    plain = tiny_pipeline("sd").text_encoder.get_input_embeddings().weight
    assert len(rows) > len(plain)
    for token, vector in load_file(tmp_path / "out/learned_embeds.safetensors").items():
        assert torch.equal(rows[pipe.tokenizer.convert_tokens_to_ids(token)], vector.reshape(-1).to(rows.dtype))


def test_concepts_without_evaluation(concepts: Path, tmp_path: Path) -> None:
    record = json.loads((concepts / "result.json").read_text())
    record["concepts"] = [{"token": each["token"], "class_word": each["class_word"]} for each in record["concepts"]]
    original = (concepts / "result.json").read_text()
    (concepts / "result.json").write_text(json.dumps(record))
    try:
        text = card(concepts, tmp_path / "out")
    finally:
        (concepts / "result.json").write_text(original)
    assert "The run was not evaluated." in text
    assert "Use `<cat>` or `<dog>`" in text

"""Model cards: several concepts, fixed adapters and settings."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from veneer.pipelines.push import PushConfig, push

from veneer.classification.config import TransferConfig
from veneer.control.config import ControlConfig
from veneer.publishing import read_run
from veneer.publishing.tables import HIDDEN, setting_rows
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.initial_adapter import file_digest
from veneer.training.personalization_config import PersonalizeConfig

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


@pytest.fixture(scope="module")
def fixed(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file of an adapter, and a finished run that was trained on top of it with many settings."""
    folder = tmp_path_factory.mktemp("fixed")
    ink = personalization(folder / "first", base, eval="none").parent / "ink.safetensors"
    ink.write_bytes((ink.parent / "run/adapter.safetensors").read_bytes())
    settings = {
        "optimizer_args": {"eps": 1e-7, "amsgrad": True}, "block_lr": {"unet": 0.5}, "schedule": "polynomial", "power": 2.0,
        "min_lr_ratio": 0.1, "max_grad_norm": 0.5, "tag_dropout": 0.2, "keep_tokens": 1, "pyramid_noise": 0.3,
        "input_perturbation": 0.1, "crop": "random", "buckets": False, "with_": (f"{ink}:0.8",),
    }  # fmt: skip
    return ink, personalization(folder / "second", base, **settings)


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


def test_card_names_the_adapters_that_are_required(fixed: tuple[Path, Path], tmp_path: Path) -> None:
    ink, run = fixed
    text = card(run, tmp_path / "out")
    section = text.split("## Requires\n")[1].split("\n## ")[0]
    assert f"| `ink.safetensors` | 0.8 | `{file_digest(ink)}` |" in section
    usage = text.split("## How to use it\n")[1].split("\n## ")[0]
    assert "--adapter ink.safetensors:0.8 user/toy" in usage
    assert 'veneer.load_all(pipe, "ink.safetensors", scale=0.8)\nveneer.load(pipe, "user/toy")' in usage
    for title in ("diffusers", "ComfyUI"):
        assert "ink.safetensors" in usage.split(f"### {title}")[1].split("###")[0]
    assert all(SECRET.encode() not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_card_without_fixed_adapters_requires_none(concepts: Path, tmp_path: Path) -> None:
    assert "## Requires" not in card(concepts, tmp_path / "out")


def test_card_lists_all_settings(fixed: tuple[Path, Path]) -> None:
    rows = dict(setting_rows(read_run(fixed[1])))
    expected = {
        "optimizer args": "eps 1e-07, amsgrad yes", "block lr": "unet 0.5", "schedule": "polynomial", "power": "2",
        "min lr ratio": "0.1", "max grad norm": "0.5", "tag dropout": "0.2", "keep tokens": "1", "pyramid noise": "0.3",
        "input perturbation": "0.1", "crop": "random", "buckets": "no", "seed": "0",
    }  # fmt: skip
    assert {name: rows.get(name) for name in expected} == expected
    assert "learning rate" in rows
    assert "prior loss weight" not in rows


@pytest.mark.parametrize("config", [PersonalizeConfig, ControlConfig, TransferConfig])
def test_settings_have_no_paths(config: type) -> None:
    """`validation` is a folder or, for other commands, a share."""
    types = typing.get_type_hints(config)
    paths = {
        field.name for field in dataclasses.fields(config) if Path in (types[field.name], *typing.get_args(types[field.name]))
    }
    assert paths - {"validation"} <= HIDDEN
    assert paths


def test_folders_of_settings_are_left_out(fixed: tuple[Path, Path]) -> None:
    run = read_run(fixed[1])
    config = {**run.config, "quantize": ["/home/me/unet.gguf", "text_encoder=/home/me/t5.gguf", "nf4"], "validation": "photos/me"}
    rows = dict(setting_rows(dataclasses.replace(run, record={**run.record, "config": config})))
    assert rows["quantize"] == "unet.gguf; text_encoder=t5.gguf; nf4"
    assert "validation" not in rows
    shares = {**config, "validation": 0.1, "quantize": []}
    assert dict(setting_rows(dataclasses.replace(run, record={**run.record, "config": shares})))["validation"] == "0.1"

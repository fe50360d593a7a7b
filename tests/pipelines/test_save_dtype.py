"""`--save-dtype`: adapter files of 16 bits, while training and checkpoints keep 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from veneer.pipelines.control import ControlConfig
from veneer.pipelines.personalize import PersonalizeConfig, personalize

import veneer
from tests.raising import raises
from veneer import SaveError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.loop.errors import TrainError
from veneer.training.save_dtype import cast_to

FILES = ("adapter.safetensors", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline("sd").save_pretrained(folder)
    (folder / "veneer.json").write_text('{"steps": 2}')
    return folder


def train(base: Path, photos: Path, out: Path, **settings: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file of a run."""
    config: dict[str, Any] = {
        "concept": "<toy>", "class_word": "cat", "steps": 4, "eval_seeds": 0, "tracker": "none", "method": "pivotal",
        "prompts": ("a {concept}",), "ema": 0.5,
    }  # fmt: skip
    personalize(PersonalizeConfig(photos=photos, base=str(base), out=out, **{**config, **settings}))
    return {name: load_file(out / name) for name in FILES}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_hold_the_rounded_values(dtype: Any, base: Path, photos: Path, tmp_path: Path) -> None:
    full = train(base, photos, tmp_path / "full")
    half = train(base, photos, tmp_path / "half", save_dtype=dtype, steps=2)
    half = train(base, photos, tmp_path / "half", save_dtype=dtype, resume=True)  # from unrounded checkpoints
    kind = getattr(torch, dtype)
    for file, tensors in full.items():
        assert tensors.keys() == half[file].keys()
        for name, tensor in tensors.items():
            assert half[file][name].dtype == kind
            assert torch.equal(half[file][name], tensor.to(kind)), (file, name)
    attached = veneer.load_all(tiny_pipeline("sd"), tmp_path / "half" / "adapter.safetensors")
    assert {p.dtype for a in attached for p in a.parameters()} == {torch.float32}, "adapters compute in float32"


def test_metrics_are_those_of_the_file(base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters with which images are generated at the end have values of the file's dtype."""
    seen: list[bool] = []

    def watched(pipe: Any, attachments: Any, *args: Any, **kwargs: Any) -> Any:
        values = [p for a in attachments for p in a.parameters()]
        seen.append(all(torch.equal(p, p.bfloat16().float()) for p in values))
        return real(pipe, attachments, *args, **kwargs)

    from veneer.training.report import artifacts

    real = artifacts.generate_pairs
    monkeypatch.setattr(artifacts, "generate_pairs", watched)
    for dtype in ("bfloat16", "float32"):
        train(base, photos, tmp_path / dtype, save_dtype=dtype, steps=1)
    assert seen == [True, False]


def test_other_dtypes_are_errors(tmp_path: Path) -> None:
    for config in (PersonalizeConfig(concept="<toy>", save_dtype="float8"), ControlConfig(save_dtype="float8")):  # type: ignore[arg-type]
        with raises(TrainError, where="save_dtype", given="float8", expected=("float32", "bfloat16", "float16")):
            config.with_defaults()


def test_values_beyond_float16_are_an_error_when_saved() -> None:
    attached = veneer.attach(tiny_pipeline("sd"), "lora", rank=2)
    with torch.no_grad():
        next(iter(attached.parameters())).fill_(1e5)
    with cast_to([attached], "bfloat16"):
        pass
    with raises(SaveError, where=attached.name, given="float16"), cast_to([attached], "float16"):
        pass
    assert {p.dtype for p in attached.parameters()} == {torch.float32}

"""`veneer prompts similarity` on runs of VPT: order and values of the lines, and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from veneer.pipelines.prompts import PromptSimilarityConfig, prompt_similarity
from veneer.pipelines.transfer import transfer

from tests.classification.small import image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.injection import OptionError
from veneer.prompt_transfer import average_similarity, read_prompts, token_similarity


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three runs; the second one starts from the prompts of the first."""
    parent = tmp_path_factory.mktemp("prompts")
    images, model = image_folder(parent / "images", count=6), model_folder(parent, "vit")
    usual: dict[str, Any] = {"data": str(images), "model": str(model), "method": "vpt", "steps": 2, "batch": 4, "workers": 1}
    first = transfer(TransferConfig(**usual, out=parent / "first"))
    second = transfer(TransferConfig(**usual, out=parent / "second", init_from=first, learning_rate=1e-4))
    return first, second, transfer(TransferConfig(**usual, out=parent / "third", seed=1))


def test_the_most_similar_pair_is_first(runs: tuple[Path, ...]) -> None:
    lines = prompt_similarity(PromptSimilarityConfig(runs, images=runs[0].parent / "images", batch=5))
    values = [[float(each) for each in re.findall(r"(?:tokens|neurons) (-?[\d.]+)", line)] for line in lines]
    assert [len(each) for each in values] == [3] * 3
    assert lines[0].startswith(f"{runs[0]} {runs[1]}:")
    assert values[0][0] > 0.99 > values[1][0] > values[2][0]
    assert values[0][2] > max(values[1][2], values[2][2])
    first, second = (read_prompts(run) for run in runs[:2])
    assert values[0][:2] == pytest.approx([average_similarity(first, second), token_similarity(first, second)], abs=1e-4)
    plain = prompt_similarity(PromptSimilarityConfig(tuple(run / "adapter.safetensors" for run in runs)))
    assert [line.count("neurons") for line in plain] == [0] * 3


def test_options(runs: tuple[Path, ...]) -> None:
    with raises(OptionError, option="files", given=("a",), expected=2):
        PromptSimilarityConfig((Path("a"),))
    with raises(OptionError, option="batch", given=0):
        PromptSimilarityConfig(runs, batch=0)
    files = tuple(run / "adapter.safetensors" for run in runs)
    with raises(OptionError, option="images", given=str(files[0])):
        prompt_similarity(PromptSimilarityConfig(files, images=runs[0].parent / "images"))

"""Averages of the prompts of several files, and which files make a library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.classifiers import tiny
from tests.prompt_transfer.test_similarity import vit
from tests.raising import raises
from veneer.formats import load
from veneer.injection import attach
from veneer.prompt_transfer import StoredPromptError, average_prompts, read_library, write_prompt
from veneer.testing.case import perturb


def saved(folder: Path, seed: int, **options: Any) -> Path:
    tuned = attach(vit(), "vpt", **{"tokens": 3, **options})
    perturb(tuned, size=0.5, seed=seed)
    return tuned.save(folder / f"{seed}-{options.get('tokens', 3)}")


def test_weighted_average(tmp_path: Path) -> None:
    library = read_library([saved(tmp_path, seed) for seed in range(3)])
    average = average_prompts(library, [1.0, 2.0, 5.0])
    assert {*average} == {*library[0].state}
    for name, tensor in average.items():
        first, second, third = (each.state[name] for each in library)
        torch.testing.assert_close(tensor, first / 8 + second / 4 + 5 * third / 8)
        assert tensor.dtype == first.dtype
    for name, tensor in average_prompts(library[1:2], [0.3]).items():
        assert torch.equal(tensor, library[1].state[name])


def test_a_written_prompt_loads_without_a_head(tmp_path: Path) -> None:
    library = read_library([saved(tmp_path, seed) for seed in range(2)])
    average = average_prompts(library, [1.0, 1.0])
    (tmp_path / "out").mkdir()
    path = write_prompt(tmp_path / "out", library[0], average, {"data": "pets"})
    model = vit()
    tuned: Any = load(model, path)
    assert tuned.provenance == {"data": "pets"}
    for name, (_, adapter) in tuned.parts.items():
        assert torch.equal(adapter.prompt, average[f"{name}:prompt"])


def test_files_that_make_no_library(tmp_path: Path) -> None:
    first = saved(tmp_path, 0)
    more = saved(tmp_path, 1, tokens=4)
    with raises(StoredPromptError, file=more, where="shapes"):
        read_library([first, more])
    coop = attach(tiny().float(), "coop", tokens=3).save(tmp_path / "coop")
    with raises(StoredPromptError, file=coop, where="method", given="coop", expected="vpt"):
        read_library([first, coop])
    other = vit()
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight.neg_()
    negated = attach(other, "vpt", tokens=3).save(tmp_path / "other")
    with raises(StoredPromptError, file=negated, where="model"):
        read_library([first, negated])
    for name, options, model in (("lora", {}, vit()), ("vpt", {"project": 4}, vit()), ("cocoop", {"words": "a"}, tiny().float())):
        path = attach(model, name, **options).save(tmp_path / f"no-{name}")
        with raises(StoredPromptError, file=path, where="prompts", given=(name,)):
            read_library([path])


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 2.0]])
def test_a_weight_of_0_leaves_a_prompt_out(weights: list[float], tmp_path: Path) -> None:
    library = read_library([saved(tmp_path, seed) for seed in range(2)])
    for name, tensor in average_prompts(library, weights).items():
        assert torch.equal(tensor, library[weights.index(max(weights))].state[name])

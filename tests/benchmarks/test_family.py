"""Contenders of the LoRA variants: comparable methods, which initially keep the base's output. Nothing is timed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from veneer.benchmarks import family
from veneer.benchmarks.interleaved_timing import Contest, ContestResult, interleave
from veneer.benchmarks.shapes import SHAPES

RANK = 4


@pytest.fixture(scope="module")
def found() -> dict[str, Contest]:
    return {contest.name: contest for contest in family.contests(SHAPES["tiny"], RANK, torch.float32, 0)}


def test_time_and_memory_of_both_models(found: dict[str, Contest]) -> None:
    assert {name: contest.unit for name, contest in found.items()} == {
        "step, ViT": "s",
        "peak memory of a step, ViT": "MB",
        "step, UNet": "s",
        "peak memory of a step, UNet": "MB",
    }


def test_pairs_of_each_method(found: dict[str, Contest]) -> None:
    with_peft = bool(importlib.util.find_spec("peft"))
    for contest in found.values():
        names = [way.name for way in contest.contenders]
        assert {name for pair in contest.pairs for name in pair} <= set(names)
        for method, kind in family.kinds(RANK, 8).items():
            assert f"veneer {method}" in names
            assert ((f"veneer {method}", f"peft {method}") in contest.pairs) == with_peft
            if contest.unit == "s":
                assert (f"veneer {method}", kind.to) in contest.pairs


def test_first_step_has_the_loss_of_the_base(found: dict[str, Contest]) -> None:
    """All methods are initialized to ΔW = 0, so that the first step of each has the same loss, and the second another."""
    for name in ("step, ViT", "step, UNet"):
        losses = {way.name: way.run(way.prepare()) for way in found[name].contenders}
        assert losses == pytest.approx(dict.fromkeys(losses, losses["floor"]), rel=1e-5)
        again = {way.name: way.run(way.prepare()) for way in found[name].contenders}
        assert not [way for way in losses if again[way] == losses[way]]


def test_memory_is_measured_once_in_megabytes(found: dict[str, Contest]) -> None:
    """The peak of a step is more than the gradient of its image, and less than the model."""
    whole = found["peak memory of a step, ViT"]
    floor = Contest(whole.name, whole.what, whole.contenders[:1], (), unit="MB")
    outcome: ContestResult = interleave(floor, rounds=5)
    (sample,) = outcome.samples
    assert outcome.unit == "MB"
    assert 1 < sample.value < 20

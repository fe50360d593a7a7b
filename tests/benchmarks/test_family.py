"""The contenders of the family's rows: like trains against like, and a fresh one gives what the base gives. Nothing is timed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from veneer.benchmarks import family
from veneer.benchmarks.contest import Contest, Outcome, interleave
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


def test_every_method_is_compared_with_peft_and_with_what_its_target_names(found: dict[str, Contest]) -> None:
    with_peft = bool(importlib.util.find_spec("peft"))
    for contest in found.values():
        names = [way.name for way in contest.contenders]
        assert {name for pair in contest.pairs for name in pair} <= set(names)
        for method, kind in family.kinds(RANK, 8).items():
            assert f"veneer {method}" in names
            assert ((f"veneer {method}", f"peft {method}") in contest.pairs) == with_peft
            if contest.unit == "s":
                assert (f"veneer {method}", kind.to) in contest.pairs


def test_before_the_first_step_all_have_the_loss_of_the_bare_base(found: dict[str, Contest]) -> None:
    """Every method begins as nothing, so the first step of each gives the same loss, and the second another."""
    for name in ("step, ViT", "step, UNet"):
        losses = {way.name: way.run(way.prepare()) for way in found[name].contenders}
        assert losses == pytest.approx(dict.fromkeys(losses, losses["floor"]), rel=1e-5)
        again = {way.name: way.run(way.prepare()) for way in found[name].contenders}
        assert not [way for way in losses if again[way] == losses[way]]


def test_memory_is_weighed_once_in_megabytes(found: dict[str, Contest]) -> None:
    """What a step holds at its peak is more than the gradient of its picture, and nothing like the model."""
    whole = found["peak memory of a step, ViT"]
    floor = Contest(whole.name, whole.what, whole.contenders[:1], (), unit="MB")
    outcome: Outcome = interleave(floor, rounds=5)
    (sample,) = outcome.samples
    assert outcome.unit == "MB"
    assert 1 < sample.value < 20

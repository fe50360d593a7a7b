"""Contenders of the switching benchmark. Nothing is timed."""

import importlib.util

import pytest
import torch

from veneer.benchmarks import switching
from veneer.benchmarks.interleaved_timing import Contest
from veneer.benchmarks.shapes import SHAPES


@pytest.fixture(scope="module")
def found() -> dict[str, Contest]:
    return {contest.name: contest for contest in switching.contests(SHAPES["tiny"], 2, torch.float32, 0)}


def test_contenders_run_and_pairs_are_valid(found: dict[str, Contest]) -> None:
    assert list(found) == ["switching", "mixed batch"]
    for contest in found.values():
        names = [contender.name for contender in contest.contenders]
        assert {name for pair in contest.pairs for name in pair} <= set(names)
        assert ("peft, mixed" in names or "peft, 50" in names) == bool(importlib.util.find_spec("peft"))


def test_untrained_adapters_keep_the_base_output(found: dict[str, Contest]) -> None:
    """B is zero in all adapters, so that each pass must equal the base's output."""
    outputs = {contender.name: contender.run(contender.prepare()) for contender in found["mixed batch"].contenders}
    assert all(output.shape[0] == switching.BATCH for output in outputs.values())
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs["base"], msg=lambda text, name=name: f"{name}: {text}")
    for contender in found["switching"].contenders:
        contender.run(contender.prepare())

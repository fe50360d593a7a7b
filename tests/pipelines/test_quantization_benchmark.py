"""The benchmark of quantized base models: errors within the published ones, differences paired by seed, no repeated runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from veneer.pipelines.quantization_benchmark import FLOAT, KINDS, collect, run_all, table

from tests.base_models.quantized import kinds, needs
from veneer import base_models
from veneer.benchmarks.quantization_error import errors

BOUNDS = {"fp8": (0.02, 0.03), "int8": (0.004, 0.011), "nf4": (0.08, 0.11)}


def write(work: Path, kind: str, seed: int, trained: float, drift: float) -> None:
    folder = work / f"{kind}-{seed}"
    folder.mkdir(parents=True)
    similarity = {"base": {"mean": 0.1}, "adapted": {"mean": trained}, "gain": {"mean": trained - 0.1}}
    (folder / "result.json").write_text(json.dumps({"metrics": {"similarity": similarity, "drift": {"mean": drift}}}))


def test_every_kind_is_measured() -> None:
    assert {*KINDS} == {FLOAT, *base_models.KINDS}


@kinds(BOUNDS)
def test_errors_of_the_bundled_base_model_are_those_of_gaussian_weights(kind: str) -> None:
    weights, noise = errors(kind)
    low, high = BOUNDS[kind]
    assert low < weights < high
    assert 0 < noise < weights, "layers that are not quantized, and the skip connections, carry most of the noise"


@needs("fp8")
def test_rows_are_means_over_seeds_and_differences_are_paired(tmp_path: Path) -> None:
    for seed, (plain, quantized) in enumerate([(0.3, 0.31), (0.5, 0.52), (0.4, 0.43)]):
        write(tmp_path, FLOAT, seed, plain, 0.2)
        write(tmp_path, "fp8", seed, quantized, 0.2 + seed / 10)
    first, second = collect(tmp_path, (FLOAT, "fp8"), (0, 1, 2))
    assert first["errors"] is None
    assert first["trained"].mean == pytest.approx(0.4)
    assert second["over_float"].mean == pytest.approx(0.02)
    assert second["over_float"].half < second["trained"].half
    assert second["drift"].mean == pytest.approx(0.3)
    lines = table([first, second]).splitlines()
    assert len(lines) == 4
    assert "+0.020 ± 0.025" in lines[3]


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    write(tmp_path, "nf4", 3, 0.3, 0.2)
    before = (tmp_path / "nf4-3" / "result.json").read_bytes()
    assert run_all(tmp_path, ("nf4",), (3,))
    assert (tmp_path / "nf4-3" / "result.json").read_bytes() == before

"""Predicted and measured memory of a training step of published models at full size, with random weights.

Each case runs in a new process, on the CPU. `python -m veneer.pipelines.memory_benchmark CASE ...` prints a row per case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict

from veneer.benchmarks.full_size import CASES, FullSizeCase, FullSizeResult, run_case
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.preflight.memory_prediction import MemoryPrediction, MemoryPredictor

HEAD = (
    "| case | weights | step, predicted | step, measured | measured / predicted | building | step |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc then returns every freed tensor at once, so that the resident memory is that of the living ones."""


def predict(case: FullSizeCase) -> MemoryPrediction:
    """The prediction of `veneer personalize --check` for the settings of a case."""
    config = PersonalizeConfig(
        base=case.base,
        options={"lora": {"rank": case.rank}},
        resolution=case.resolution,
        dtype=case.dtype,  # type: ignore[arg-type]
        quantize=(case.quantize,) if case.quantize else (),
        gradient_checkpointing=case.gradient_checkpointing,
    )
    return MemoryPredictor("cuda").predict(config.with_defaults())


def measure(name: str) -> FullSizeResult:
    """Runs a case in a new process, whose memory is measured."""
    code = f"import sys; from {__name__ if __name__ != '__main__' else 'veneer.pipelines.memory_benchmark'} import child; child()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, name], env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, check=True
    )
    return FullSizeResult(**json.loads(done.stdout.splitlines()[-1]))


def child() -> None:
    """Runs the case named on the command line and prints its result as JSON."""
    print(json.dumps(asdict(run_case(CASES[sys.argv[1]]))))


def row(name: str, prediction: MemoryPrediction, result: FullSizeResult) -> str:
    """A row of the table, in GiB and seconds. The denoiser alone is on the device, as with offloaded encoders."""
    weights = prediction.weights[prediction.denoiser] + prediction.adapters
    predicted = prediction.phases(offloads=True)["training"]
    cells = (f"{count / 2**30:.2f}" for count in (weights, predicted, result.step))
    times = f"{result.build_seconds:.0f} s | {result.seconds:.0f} s"
    return f"| {name} | {' | '.join(cells)} | {result.step / predicted:.3f} | {times} |"


def main(names: list[str]) -> None:
    """Predicts and measures the cases, one after the other."""
    print(HEAD, flush=True)
    for name in names or list(CASES):
        print(row(name, predict(CASES[name]), measure(name)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cases", nargs="*", choices=[*CASES, []], metavar="CASE", help=f"some of {', '.join(CASES)} (default: all)"
    )
    main(parser.parse_args().cases)

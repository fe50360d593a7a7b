"""Benchmark of quantized base models: kinds × seeds of `veneer personalize` on the bundled base model and a photographed subject.

Also the error of each kind against float32: of the weights (relative Frobenius norm over all quantized layers), and of the noise
that the UNet predicts for the same inputs. Existing runs are not repeated. `python -m veneer.pipelines.quantization_benchmark`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer import base_models
from veneer.benchmarks.quantization_error import errors
from veneer.training.report.metrics import mean_interval

from .personalize import PersonalizeConfig, personalize

FLOAT = "none"
KINDS = (FLOAT, "fp8", "int8", "int8-torchao", "int8-quanto", "int4", "nf4", "nf4-dq", "fp4", "fp4-dq")
SUBJECT: dict[str, Any] = {
    "photos": base_models.examples("sneaker"),
    "concept": "<sneaker>",
    "class_word": "shoe",
    "method": "pivotal",
    "steps": 150,
    "prompts": ("a photo of a {concept}",),
    "drift_prompts": ("a photo of a mug",),
    "tracker": "none",
}
"""Options of every run: half the default steps, three images for the similarity and three for the drift."""


def run_all(work: Path, kinds: Sequence[str], seeds: Sequence[int]) -> bool:
    """Runs what is missing in the folder. Returns whether all is there: a run that is stopped ends the benchmark."""
    for seed in seeds:
        for kind in kinds:
            out = work / f"{kind}-{seed}"
            if not (out / "result.json").is_file():
                personalize(PersonalizeConfig(**SUBJECT, seed=seed, quantize=() if kind == FLOAT else (kind,), out=out))
                if not (out / "result.json").is_file():
                    return False
    return True


def collect(work: Path, kinds: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per kind: metrics and their intervals over seeds, and the difference to float32, paired by seed."""
    records = {(k, s): json.loads((work / f"{k}-{s}" / "result.json").read_text("utf-8")) for k in kinds for s in seeds}

    def values(kind: str, name: str, image: str) -> list[float]:
        found = [records[kind, seed]["metrics"][name] for seed in seeds]
        return [each[image]["mean"] if image else each["mean"] for each in found]

    rows = []
    for kind in kinds:
        trained, plain = values(kind, "similarity", "adapted"), values(FLOAT, "similarity", "adapted")
        row: dict[str, Any] = {"kind": kind, "base": mean_interval(values(kind, "similarity", "base"))}
        row |= {"trained": mean_interval(trained), "gain": mean_interval(values(kind, "similarity", "gain"))}
        row["over_float"] = mean_interval([a - b for a, b in zip(trained, plain, strict=True)])
        row["drift"] = mean_interval(values(kind, "drift", ""))
        row["errors"] = None if kind == FLOAT else errors(kind)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = ["quantization", "error of the weights", "error of the noise", "similarity: base", "trained", "gain", "over float32"]
    lines = [f"| {' | '.join([*heads, 'drift'])} |", f"|---|{'---:|' * len(heads)}"]
    for row in rows:
        shown = [f"{100 * error:.2f} %" for error in row["errors"]] if row["errors"] else ["", ""]
        over = "" if row["kind"] == FLOAT else row["over_float"].cell("+")
        cells = [
            row["kind"],
            *shown,
            row["base"].cell(),
            row["trained"].cell(),
            row["gain"].cell("+"),
            over,
            row["drift"].cell(),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/quantized"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder of the table (default: only print it)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(arguments)
    if run_all(options.work, options.kinds, options.seeds):
        shown = table(collect(options.work, options.kinds, options.seeds))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "quantized.md").write_text(shown + "\n", encoding="utf-8")
        print(shown)


if __name__ == "__main__":
    main()

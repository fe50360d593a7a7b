"""From filled icons to outlines without labels of outlines: MAD-X and BAD-X, compared with one adapter of filled icons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.atomic_files import write_json
from veneer.classification.predict import open_predictor

from .icons import STYLES
from .joint import SINGLE, joint_job, single_runs
from .report import Row
from .runs import Run, Runs

DOMAIN = "mad_x"
EXCHANGED = f"{SINGLE} on mad_x, domain exchanged (MAD-X)"


def style_rows(runs: Runs, seeds: Sequence[int]) -> list[Row]:
    """A row for each way, with the test accuracies of filled icons, whose shapes are trained, and of outlines.

    The domain adapters are trained to tell the nine places of icons of one style (MAD-X) or of both (BAD-X), so that they need no
    names of shapes. The learning rates are those of the single domains, and of `pfeiffer` on single tasks.
    """
    found: dict[str, list[dict[str, float]]] = {}
    parameters: dict[str, int] = {}
    for seed in seeds:
        for label, (run, exchange) in _runs_of_seed(runs, seed).items():
            scores = {STYLES[0]: run.test, STYLES[1]: _saved_accuracy(run, runs.images.many(STYLES[1], seed) / "test", exchange)}
            found.setdefault(label, []).append(scores)
            parameters.setdefault(label, run.parameters)
    return [
        Row(label, {style: [scores[style] for scores in each] for style in STYLES}, parameters[label])
        for label, each in found.items()
    ]


def _runs_of_seed(runs: Runs, seed: int) -> dict[str, tuple[Run, dict[str, Path]]]:
    """By row, the run that knows the shapes of filled icons, and what is exchanged for outlines."""
    images, filled = runs.images, str(runs.images.many(STYLES[0], seed))
    places = {style: images.places(style, seed) for style in STYLES}
    domains = runs.row("domain", seed, {style: {"method": DOMAIN, "data": str(places[style])} for style in STYLES})
    both = runs.row("domain-both", seed, {"both": joint_job(places, DOMAIN)}, "domain")["both"]

    def on_top(name: str, domain: Run) -> Run:
        job: Mapping[str, Any] = {"method": SINGLE, "data": filled, "with_": (str(domain.folder),)}
        return runs.row(name, seed, {"task": job}, "single")["task"]

    stacked = on_top("mad-x", domains[STYLES[0]])
    return {
        "linear probe": (runs.probe("probe/filled", seed, data=filled), {}),
        SINGLE: (single_runs(runs, seed)[STYLES[0]], {}),
        f"{SINGLE} on mad_x, domain kept": (stacked, {}),
        EXCHANGED: (stacked, {DOMAIN: domains[STYLES[1]].folder}),
        f"{SINGLE} on mad_x of both styles (BAD-X)": (on_top("bad-x", both), {}),
    }


def _saved_accuracy(run: Run, images: Path, exchange: Mapping[str, Path]) -> float:
    """`accuracy`, saved in the folder of the run."""
    file = run.folder / f"{images.parent.name}{'-exchanged' if exchange else ''}.json"
    if not file.is_file():
        write_json(file, accuracy(run.folder, images, exchange))
    return float(json.loads(file.read_text(encoding="utf-8")))


def accuracy(run: Path, images: Path, exchange: Mapping[str, Path]) -> float:
    """Share of the images `CLASS/IMAGE` of a folder whose most probable class is theirs.

    Args:
        exchange: as of `open_predictor`.
    """
    paths = sorted(path for folder in images.iterdir() for path in folder.iterdir())
    predictions = open_predictor(run, exchange=exchange).predict(paths, top=1)
    correct = [each.label == path.parent.name for path, each in zip(paths, predictions, strict=True)]
    return sum(correct) / len(correct)

"""Files of a method comparison: `results.json`, `compare.md` and `accuracy.png`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from veneer.atomic_files import write_atomically, write_json

from ..train.comparison import Comparison
from .comparison_table import comparison_page, summarize_runs, write_accuracy_plot


def write_comparison(config: Mapping[str, Any], comparison: Comparison, out: Path, *, plot: bool = True) -> None:
    """Writes the results so far. Runs of earlier comparisons with other options are kept in the file, but not in the table.

    Args:
        config: the options, for the record and the description of the table. `plot`: also write the plot.
    """
    runs, data = comparison.current, comparison.views.data
    lines = summarize_runs(runs, [*dict.fromkeys(run.row for run in runs)])
    metric = data.objective.short
    record = {
        "config": config,
        "data": {"where": data.source.where, "classes": list(data.classes), "split_digest": data.splits.digest},
        "model": {"name": comparison.classifier.name, "weights": comparison.classifier.weights},
        **({"metric": data.objective.metric} if data.objective.multiple else {}),
        "search": comparison.searches(),
        "runs": [asdict(run) for run in runs],
        "other_runs": [asdict(run) for run in comparison.done if run not in runs],
    }
    write_json(out / "results.json", record)
    title = f"{config['model']} on {Path(data.source.where).name}"
    page = comparison_page(title, _about(config, comparison), lines, metric)
    write_atomically(out / "compare.md", page.encode())
    if plot:
        write_accuracy_plot(lines, title, out / "accuracy.png", metric)


def _about(config: Mapping[str, Any], comparison: Comparison) -> str:
    """Sentences on the data and the options."""
    data = comparison.views.data
    train, validation, test = (len(each) for each in (data.splits.train, data.splits.validation, data.splits.test))
    return (
        f"{len(data.classes)} classes; {train:,} training, {validation:,} validation and {test:,} test images. "
        f"{run_length(config)}, batch size {config['batch']}, augmentation {config['augment']}. "
        "± is half a 95 % interval over seeds (Student's t); differences are paired by seed."
    )


def run_length(config: Mapping[str, Any]) -> str:
    """Steps or epochs of each run."""
    return f"{config['epochs']} epochs" if config["steps"] is None else f"{config['steps']} steps"

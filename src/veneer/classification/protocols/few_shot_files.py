"""Files of comparisons on few-shot samples of a dataset: curves over the shots, and generalization to new classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.atomic_files import write_atomically, write_json

from ..data.run_data import Data
from ..report.comparison_files import run_length
from ..train.comparison import RunMetrics
from .base_to_new_table import base_to_new_page, summarize_base_to_new
from .few_shot_plot import FILE, write_few_shot_plot
from .few_shot_table import few_shot_page, summarize_few_shot
from .protocol_table import task_runs


def write_few_shot(config: Mapping[str, Any], data: Data, runs: Mapping[int, Sequence[RunMetrics]], out: Path) -> Path:
    """Writes `few_shot.json`, `few_shot.md` and `few_shot.png` of the runs so far.

    Args:
        config: the options, for the record and the description of the table. `data`: of all images. `runs`: number of shots to
            its runs.
    Returns:
        The page.
    """
    records, about = summarize_few_shot(runs), _about(config, data, runs) + " Differences are paired by seed."
    write_json(out / FILE, {"config": config, "table": records})
    title = f"{config['model']} on {Path(data.source.where).name}"
    write_atomically(out / "few_shot.md", few_shot_page(title, about, records).encode())
    write_few_shot_plot({config["model"]: records}, out / "few_shot.png")
    return out / "few_shot.md"


def write_base_to_new(config: Mapping[str, Any], data: Data, runs: Mapping[int, Sequence[RunMetrics]], out: Path) -> Path:
    """Writes `base_to_new.json` and `base_to_new.md` of the runs so far; as `write_few_shot`."""
    task = Path(data.source.where).name
    records = summarize_base_to_new(None, [run for shots, each in runs.items() for run in task_runs(task, shots, each)])
    write_json(out / "base_to_new.json", {"config": config, "table": records})
    page = base_to_new_page(None, records, _about(config, data, runs))
    write_atomically(out / "base_to_new.md", page.encode())
    return out / "base_to_new.md"


def _about(config: Mapping[str, Any], data: Data, runs: Mapping[int, Sequence[RunMetrics]]) -> str:
    """Sentences on the data and the options."""
    seeds = len({run.seed for each in runs.values() for run in each})
    search = f"; learning rates of a search with {max(config['shots'])} shots" if config["search"] else ""
    return (
        f"{config['model']}. {len(data.classes)} classes; {len(data.splits.test):,} test images. {run_length(config)}, batch "
        f"size {config['batch']}, augmentation {config['augment']}{search}. Test accuracy in %; ± is half a 95 % interval over "
        f"{seeds} seeds, each with its own sample of the images."
    )

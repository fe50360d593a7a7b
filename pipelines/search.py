"""Search combinations of methods, blocks and sizes under a parameter budget, and train the best."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from veneer.pipelines.transfer import transfer

from veneer.atomic_files import write_atomically, write_json
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Data, Views, open_data
from veneer.classification.data.sources import local_data
from veneer.classification.models.classifier import Classifier
from veneer.classification.models.loading import open_classifier
from veneer.classification.search.block_sites import BlockSites
from veneer.classification.search.config import SearchConfig
from veneer.classification.search.evolution import Trial, best_trial, evolve
from veneer.classification.search.scoring import scorer
from veneer.classification.search.search_methods import parse_methods
from veneer.classification.search.search_report import TrainedRow, read_row, search_page, search_record, write_pareto_plot
from veneer.classification.search.space import Space
from veneer.classification.search.spaces import build_space
from veneer.classification.search.sub_network import SubNetwork
from veneer.classification.search.sub_network_config import config_of, single_method
from veneer.classification.search.trial_log import TrialLog
from veneer.config_file import CONFIG, to_toml, write_config
from veneer.injection import OptionError, VeneerError
from veneer.training.report.run_folder import discard_unused, run_folder

__all__ = ["SearchConfig", "search"]


def search(config: SearchConfig, accelerator: Accelerator | None = None) -> Path:
    """Searches on the training and validation splits, trains the chosen sub-network, and evaluates the test split once.

    The folder then has `trials.jsonl` (a line for each trial), `result.json`, `search.md`, `pareto.png`, the options
    (`config.toml`), the run folder `best` of the chosen sub-network, whose `config.toml` repeats it by `veneer transfer
    --config`, and with `baselines` a run folder `single-METHOD` for each method alone. A stopped search continues with `resume`,
    with the same result.

    Returns:
        The folder with the results.
    Raises:
        VeneerError: invalid configuration or data, or every trial diverged. KeyboardInterrupt: stopped.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    if accelerator.num_processes > 1:
        message = "veneer search needs a single process; start only one."
        raise VeneerError(message, where="processes", given=accelerator.num_processes, expected=1)
    config = config.with_defaults()
    with discard_unused(config.out):
        return _run(config, accelerator)


def _run(config: SearchConfig, accelerator: Accelerator) -> Path:
    methods = parse_methods(config.methods or "", config.sizes)
    base = config.shared()
    base.check_training_options()
    out = run_folder(config.out, config.resume, local_data(config.data) if config.data not in (None, "digits") else None)
    if (out / "result.json").exists():
        print(f"{out}: this search is already finished.")
        return out
    data = open_data(base, out)
    for note in data.notes:
        print(f"note: {note}", flush=True)
    classifier = open_classifier(base.model, data.classes, weights=base.weights, size=base.size, seed=base.seed)
    if not classifier.fresh:
        message = f"model is {config.model}; expected a vision model with a new head, such as `bundled` or a timm name."
        raise OptionError(message, option="model", given=config.model, expected="a vision model with a new head")
    sites = BlockSites(classifier.model, methods, config.groups, spindle=config.space == "s4")
    space = build_space(config.space, sites, config.budget_parameters)
    log = TrialLog(out, sites.names, config.settings(data.splits.digest, classifier.identity), resume=config.resume)
    trials = _evolve(config, base, space, log, classifier, data, accelerator)
    best = best_trial(trials)
    if best.val_accuracy is None:
        message = f"all {len(trials)} trials diverged. Choose a lower --learning-rate."
        raise VeneerError(message, where="trials", given=len(trials), expected="a finite loss")
    rows = _train_rows(config, base, space, best.sub, out, accelerator)
    _write(config, data, space, trials, best, rows, out)
    return out


def _evolve(
    config: SearchConfig, base: TransferConfig, space: Space, log: TrialLog, classifier: Classifier, data: Data,
    accelerator: Accelerator,
) -> list[Trial]:  # fmt: skip
    """The trials of the search; those in the log are not repeated."""
    names, numbers = space.sites.names, iter(range(1, config.trials + 1))
    with Views(data, classifier.data, base.augment, squash=base.squash, seed=base.seed, workers=base.workers) as views:
        score = scorer(config, base, space, classifier, views, log.file.parent, accelerator)
        write_config(log.file.parent / CONFIG, "search", config)

        def evaluate(sub: SubNetwork) -> Trial:
            trial = log.evaluate(sub, space.parameters(sub), lambda: score(sub))
            accuracy = "diverged" if trial.val_accuracy is None else f"validation accuracy {trial.val_accuracy:.1%}"
            print(f"trial {next(numbers)} of {config.trials}: {accuracy}, {trial.parameters:,} parameters, {sub.text(names)}",
                  flush=True)  # fmt: skip
            return trial

        return evolve(space, config.evolution(), evaluate)


def _train_rows(
    config: SearchConfig, base: TransferConfig, space: Space, best: SubNetwork, out: Path, accelerator: Accelerator
) -> list[TrainedRow]:
    """Trains the chosen sub-network, and each method alone at the same budget; finished runs with the same options are kept."""
    sites = space.sites
    subs = {"search": best}
    for index, name in enumerate(sites.names) if config.baselines else ():
        single = single_method(sites, index, config.budget_parameters)
        if single is None:
            print(f"{name} alone: its smallest size in all blocks is above the budget; left out", flush=True)
        else:
            subs[name] = single
    rows = []
    for label, sub in subs.items():
        folder = out / ("best" if label == "search" else f"single-{label}")
        print(f"{label}: training {sub.text(sites.names)}, {space.parameters(sub):,} parameters", flush=True)
        run = dataclasses.replace(config_of(base, sites, sub), out=folder, resume=True)
        _discard_other_run(run)
        transfer(run, accelerator)
        if not (folder / "result.json").is_file():
            raise KeyboardInterrupt
        rows.append(read_row(label, sub, sites.names, space.parameters(sub), folder))
    return rows


def _discard_other_run(config: TransferConfig) -> None:
    """Deletes the run in `config.out` if it has other options, such as those of a sub-network chosen from fewer trials.

    The number of `workers` may differ. A folder without `config.toml` has no trained step, and stays.
    """
    assert config.out is not None
    file = config.out / CONFIG
    if file.is_file() and _compared_lines(file.read_text(encoding="utf-8")) != _compared_lines(to_toml("transfer", config)):
        print(f"{config.out}: of an earlier choice or other options; trained again", flush=True)
        shutil.rmtree(config.out)


def _compared_lines(toml: str) -> list[str]:
    return [line for line in toml.splitlines() if not line.startswith("workers = ")]


def _write(
    config: SearchConfig, data: Data, space: Space, trials: list[Trial], best: Trial, rows: list[TrainedRow], out: Path
) -> None:
    """Writes the results, and prints the page."""
    names, splits = space.sites.names, data.splits
    title = f"{config.model} on {Path(data.source.where).name}, space {config.space}"
    blocks = "-".join(str(end - first) for first, end in space.sites.groups)
    about = (
        f"{len(data.classes)} classes; {len(splits.train):,} training, {len(splits.validation):,} validation and "
        f"{len(splits.test):,} test images. {len(trials)} trials with at most {config.budget_parameters:,} trainable parameters "
        f"without the head; sizes are by group of blocks, with {blocks} blocks. The trials are compared by validation accuracy; "
        "each row of the second table was trained anew, and evaluated once on the test split."
    )
    write_pareto_plot(trials, best, config.budget_parameters, title, out / "pareto.png")
    page = search_page(title, about, trials, names, rows, best)
    write_atomically(out / "search.md", page.encode())
    write_json(out / "result.json", {"config": asdict(config), **search_record(trials, names, rows)})
    print(page)
    print(f"repeat the chosen one: veneer transfer --config {out / 'best' / 'config.toml'}")

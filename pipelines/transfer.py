"""Fine-tune a pretrained model for image classification."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Data, Views, open_data
from veneer.classification.data.sources import local_data
from veneer.classification.data.unlabeled import read_unlabeled
from veneer.classification.models.cached_features import CachedFeatures
from veneer.classification.models.classifier import Classifier
from veneer.classification.models.loading import open_classifier
from veneer.classification.objectives.objective import Objective
from veneer.classification.report.artifacts import tidy, write_files, write_results
from veneer.classification.tasks.merged_data import open_task_data
from veneer.classification.tasks.results import task_plan, task_summary, write_task_results
from veneer.classification.tasks.trainer import TaskTrainer
from veneer.classification.train.attach_methods import attach_methods
from veneer.classification.train.hyperparameter_search import search_hyperparameters
from veneer.classification.train.train import ClassifierTrainer, TransferResult
from veneer.config_file import CONFIG, ConfigWriter
from veneer.injection import Attachment
from veneer.training.fixed_adapters import attach_fixed, read_fixed, source_identity
from veneer.training.loop.distributed import on_main
from veneer.training.loop.optimizer_step import AUTOCAST
from veneer.training.preflight.estimates import written_bytes
from veneer.training.preflight.preflight import require_disk
from veneer.training.report.bars import show_bar
from veneer.training.report.phases import report_of_run
from veneer.training.report.progress import ProgressLine
from veneer.training.report.run_folder import discard_unused, run_folder, stopped_message
from veneer.training.report.verdict import read_verdict

__all__ = ["TransferConfig", "transfer"]


def transfer(config: TransferConfig, accelerator: Accelerator | None = None) -> Path:
    """Trains, selects the epoch on the validation split, evaluates the test split once, and writes the results.

    The folder then has `adapter.safetensors`, `result.json`, `confusion.png` (with several labels `average_precision.png`),
    `curves.png` and `mistakes.png`; `veneer predict` also reads its `model.json`, and a resumed run its `splits.json`. A stopped
    run leaves the best epoch so far, which `veneer predict` can open, and continues with `resume`. With `tasks`, the scores
    of each task and their mean are in `result.json`, and the plots of a task in `tasks/NAME`.

    Returns:
        The folder with the results.
    Raises:
        VeneerError: invalid configuration or data; nothing has been trained.
        Diverged: the loss is no longer finite; the last good weights are in the folder.
    """
    cpu = not torch.accelerator.is_available()
    accelerator = accelerator or Accelerator(cpu=cpu)
    config = on_main(accelerator, config.with_defaults)
    with discard_unused(config.out):
        return _run(config, accelerator)


def _run(config: TransferConfig, accelerator: Accelerator) -> Path:
    config.build_methods()
    inputs = config.task_sources().values() or (config.data,)
    out = run_folder(config.out, config.resume, *(local_data(data) for data in inputs if data not in (None, "digits")))
    if (out / "result.json").exists():
        print(f"{out}: this run is already finished.")
        return out
    open_images = open_task_data if config.tasks else open_data
    data = on_main(accelerator, lambda: open_images(config, out, _progress("checking images")))
    for note in data.notes if accelerator.is_main_process else ():
        print(f"note: {note}", flush=True)
    report = report_of_run(out, accelerator.is_main_process, config.dry_run)
    on_step = ConfigWriter(out / CONFIG, "transfer", config, ProgressLine())
    report("loading")
    classifier = open_classifier(
        config.model, data.classes, weights=config.weights, keep_head=config.keeps_head(), size=config.size, seed=config.seed,
        templates=config.templates,
    )  # fmt: skip
    fixed = read_fixed(config.with_)
    attach_fixed(classifier.model, fixed)
    report.close()
    unlabeled = None if config.unlabeled is None else read_unlabeled(config.unlabeled, data.source.mirror)
    with Views(
        data, classifier.data, config.augment, squash=config.squash, seed=config.seed, workers=config.workers, unlabeled=unlabeled
    ) as views:
        features = CachedFeatures(classifier, views, config.batch, AUTOCAST[config.mixed_precision])
        config = search_hyperparameters(config, classifier, views, out, accelerator, features)
        attached = attach_methods(classifier, config, data)
        sources = source_identity(config.init_from, fixed)
        identity = {**config.identity(), **sources, "splits": data.splits.digest, **classifier.identity}
        kind = TaskTrainer if config.tasks else ClassifierTrainer
        trainer = kind(classifier, attached, views, config, out, accelerator, identity, on_step, features)
        if accelerator.is_main_process:
            print(_plan(config, data, classifier, attached, trainer), flush=True)
        if config.dry_run:
            return out
        best = 4 * trainer.trainable
        require_disk(out, best + written_bytes(trainer.trainable, config.loop(trainer.per_epoch, trainer.steps)))
        result = trainer.train()
        if accelerator.is_main_process:
            if result.best is None:
                write_files(config, data, classifier, attached, out)
                print(stopped_message(result.loop, trainer.steps, out))
            else:
                report("evaluating")
                print(_write(config, data, classifier, attached, trainer, result))
    accelerator.wait_for_everyone()
    return out


def _write(
    config: TransferConfig,
    data: Data,
    classifier: Classifier,
    attached: list[Attachment],
    trainer: ClassifierTrainer,
    result: TransferResult,
) -> str:
    """Writes the results of a finished run, and returns their summary."""
    out = trainer.folder
    if isinstance(trainer, TaskTrainer):
        summary = task_summary(write_task_results(config, data, classifier, attached, trainer, result), data, out)
    else:
        summary = _summary(write_results(config, data, classifier, attached, trainer, result), data.objective, out)
    tidy(out)
    return summary


def _progress(label: str) -> Callable[[int, int], None]:
    """Callback that shows a bar on a terminal."""

    def update(done: int, count: int) -> None:
        if sys.stderr.isatty():
            show_bar(sys.stderr, label, done, count)

    return update


def _summary(record: dict[str, Any], objective: Objective, out: Path) -> str:
    """Metrics, verdict and next commands."""
    low, high = record["test_interval_95"]
    metric, test, validation = objective.metric, record[f"test_{objective.key}"], record[f"val_{objective.key}"]
    return (
        f"test {metric} {test:.1%} (95 % interval {low:.1%} to {high:.1%}), validation {metric} "
        f"{validation:.1%}, epoch {record['chosen']['epoch']}; test {_further(record['test'])}; "
        f"{record['trainable_parameters']:,} trainable "
        f"parameters, adapter of {record['stored_bytes']:,} bytes in {out}\n{read_verdict(record).text()}\n"
        f"classify images: veneer predict {shlex.quote(str(out))} IMAGE …\n"
        f"use it without veneer: veneer export {shlex.quote(str(out))} --to onnx"
    )


def _further(test: dict[str, Any]) -> str:
    """Further metrics that the test images have."""
    shown = [f"macro F1 {test['macro_f1']:.1%}"]
    if "micro_f1" in test:
        shown.append(f"micro F1 {test['micro_f1']:.1%}")
    if test.get("top5_accuracy") is not None:
        shown.append(f"top-5 accuracy {test['top5_accuracy']:.1%}")
    if test.get("auc") is not None:
        shown.append(f"AUC {test['auc']:.3f}")
    return ", ".join(shown)


def _plan(
    config: TransferConfig, data: Data, classifier: Classifier, attached: list[Attachment], trainer: ClassifierTrainer
) -> str:
    """Summary of the data, the model and the training before it starts."""
    splits = data.splits
    lines = [
        f"{data.source.where}: {len(data.classes)} classes; {len(splits.train):,} training, {len(splits.validation):,} "
        f"validation and {len(splits.test):,} test images",
        *(task_plan(trainer) if isinstance(trainer, TaskTrainer) else ()),
        f"{classifier.name}: input size {classifier.data['input_size'][1]} pixels, weights {classifier.weights[:16]}",
    ]
    for a in attached:
        lines.append(f"{a.method.name}: {len(a.parts)} sites, {sum(p.numel() for p in a.parameters()):,} trainable parameters")
    inputs = "cached features" if trainer.features is not None else f"augmentation {config.augment}"
    if trainer.uses_probe_init:
        lines.append("head: initialized with the logistic regression on the frozen features")
    size = config.batch * config.gradient_accumulation_steps
    lines.append(f"{trainer.steps:,} steps, batch size {size}, learning rate {config.rate():g}, {inputs}")
    return "\n".join(lines)

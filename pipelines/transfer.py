"""Teach a pre-trained model to tell classes of pictures apart."""

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
from veneer.classification.models.cached_features import Features
from veneer.classification.models.classifier import Classifier
from veneer.classification.models.loading import open_classifier
from veneer.classification.report.artifacts import tidy, write_files, write_outcome
from veneer.classification.train.hyperparameter_search import searched
from veneer.classification.train.train import Teacher, attach_methods
from veneer.injection import Attachment
from veneer.training.loop.distributed import on_main
from veneer.training.loop.optimizer_step import AUTOCAST
from veneer.training.preflight.estimates import written_bytes
from veneer.training.preflight.preflight import require_disk
from veneer.training.report.phases import PhaseReport
from veneer.training.report.progress import ProgressLine
from veneer.training.report.run_folder import discard_unused, run_folder, stopped
from veneer.training.report.verdict import read_verdict

__all__ = ["TransferConfig", "transfer"]


def transfer(config: TransferConfig, accelerator: Accelerator | None = None) -> Path:
    """Train, choose the epoch on the validation pictures, look at the test pictures once, and write what was found.

    A run that is stopped leaves the best epoch so far, which `veneer predict` opens, and goes on with `resume`.

    The folder then has `adapter.safetensors`, `result.json`, `confusion.png`, `curves.png`, `mistakes.png`, and `model.json` and
    `splits.json`, which say how to go on from there.

    Returns:
        The folder with the results.
    Raises:
        VeneerError: what was given cannot work; nothing has been trained then.
        Diverged: the loss is no longer finite; the last good weights are in the folder.
    """
    cpu = not torch.accelerator.is_available()
    accelerator = accelerator or Accelerator(cpu=cpu)
    config = on_main(accelerator, config.completed)
    with discard_unused(config.out):
        return _run(config, accelerator)


def _run(config: TransferConfig, accelerator: Accelerator) -> Path:
    config.built()
    out = run_folder(config.out, config.resume, None if config.data == "digits" else config.data)
    if (out / "result.json").exists():
        print(f"{out} is finished already.")
        return out
    data = on_main(accelerator, lambda: open_data(config, out, _progress("pictures checked")))
    for note in data.notes if accelerator.is_main_process else ():
        print(f"note: {note}", flush=True)
    report = (
        PhaseReport(None if config.dry_run else out / "progress.jsonl", sys.stderr)
        if accelerator.is_main_process
        else PhaseReport()
    )
    report("loading")
    classifier = open_classifier(
        config.model, data.classes, weights=config.weights, keep_head=config.keeps_head(), size=config.size, seed=config.seed,
        templates=config.templates,
    )  # fmt: skip
    report.close()
    with Views(data, classifier.data, config.augment, squash=config.squash, seed=config.seed, workers=config.workers) as views:
        features = Features(classifier, views, config.batch, AUTOCAST[config.mixed_precision])
        config = searched(config, classifier, views, out, accelerator, features)
        attached = attach_methods(classifier, config, data)
        identity = {**config.identity(), "splits": data.splits.digest, "weights": classifier.weights}
        teacher = Teacher(classifier, attached, views, config, out, accelerator, identity, ProgressLine(), features)
        if accelerator.is_main_process:
            print(_plan(config, data, classifier, attached, teacher), flush=True)
        if config.dry_run:
            return out
        best = 4 * teacher.trainable
        require_disk(out, best + written_bytes(teacher.trainable, config.loop(teacher.per_epoch, teacher.steps)))
        taught = teacher.teach()
        if accelerator.is_main_process:
            if taught.best is None:
                write_files(config, data, classifier, attached, out)
                print(stopped(taught.result, teacher.steps, out))
            else:
                report("evaluating")
                record = write_outcome(config, data, classifier, attached, teacher, taught)
                tidy(out)
                print(_told(record, out))
    accelerator.wait_for_everyone()
    return out


def _progress(what: str) -> Callable[[int, int], None]:
    """A line on a terminal that counts."""

    def told(done: int, count: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what}: {done:,}/{count:,}", end="\n" if done == count else "", file=sys.stderr, flush=True)

    return told


def _told(record: dict[str, Any], out: Path) -> str:
    """The figures in a line."""
    low, high = record["test_interval_95"]
    return (
        f"test accuracy {record['test_accuracy']:.1%} ({low:.1%} to {high:.1%}), validation {record['val_accuracy']:.1%}, epoch "
        f"{record['chosen']['epoch']}; {record['trainable_parameters']:,} numbers trained, "
        f"{record['stored_bytes']:,} bytes in {out}\n{read_verdict(record).text()}\n"
        f"classify images: veneer predict {shlex.quote(str(out))} IMAGE …"
    )


def _plan(config: TransferConfig, data: Data, classifier: Classifier, attached: list[Attachment], teacher: Teacher) -> str:
    """What will be trained, on what."""
    splits = data.splits
    lines = [
        f"{data.source.where}: {len(data.classes)} classes; {len(splits.train):,} pictures to train, "
        f"{len(splits.validation):,} to choose the epoch, {len(splits.test):,} to test",
        f"{classifier.name}: pictures of {classifier.data['input_size'][1]} pixels, weights {classifier.weights[:16]}",
    ]
    for a in attached:
        lines.append(f"{a.method.name}: {len(a.parts)} sites, {sum(p.numel() for p in a.parameters()):,} numbers")
    how = "on features that are computed once" if teacher.features is not None else f"augmented: {config.augment}"
    if teacher.starts_head:
        lines.append("the head starts at the logistic regression on the frozen features")
    lines.append(f"{teacher.steps:,} steps of {config.batch * config.accumulation}, rate {config.rate():g}, {how}")
    return "\n".join(lines)

"""Result files of `veneer transfer`: the adapter, the metrics and their plots."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from veneer.atomic_files import write_json
from veneer.formats import native
from veneer.injection import Attachment, attachments
from veneer.training.fixed_adapters import strengths_of
from veneer.training.loop.disk_space import writing

from ..config import TransferConfig
from ..data.run_data import Data
from ..models.classifier import Classifier
from ..objectives.objective import Evaluation, Metrics
from ..tasks.task import Task
from ..train.hyperparameter_search import read_search
from ..train.train import ClassifierTrainer, TransferResult
from .plots import write_curves
from .verdict import evidence_of, verdict

FORM = 1


def write_results(
    config: TransferConfig,
    data: Data,
    classifier: Classifier,
    attached: Sequence[Attachment],
    trainer: ClassifierTrainer,
    result: TransferResult,
) -> dict[str, Any]:
    """Evaluates the test split, once, and writes `adapter.safetensors`, `model.json`, the plots and `result.json`.

    Returns:
        The content of `result.json`.
    """
    out = trainer.folder
    assert result.best is not None
    stored = write_files(config, data, classifier, attached, out)
    logits, labels = trainer.predict("test")
    metrics = data.objective.metrics(logits, labels)
    images = [data.source.examples[index] for index in data.splits.test]
    write_curves(result.loop.losses, result.epochs, result.best, out / "curves.png", data.objective.metric)
    evaluation = Evaluation(logits, labels, classifier.classes, lambda i: data.source.read(images[i]))
    data.objective.write_plots(evaluation, metrics, out)
    record = run_record(config, data, classifier, attached, result, metrics) | {
        "stored_bytes": stored,
        "search": read_search(out),
    }
    assert result.validation is not None
    record["verdict"] = verdict(evidence_of(trainer, (logits, labels), result.validation), config).as_dict()
    with writing(out, "result.json"):
        write_json(out / "result.json", record)
    return record


def write_files(config: TransferConfig, data: Data, classifier: Classifier, attached: Sequence[Attachment], out: Path) -> int:
    """Writes the files that `veneer predict` needs: `adapter.safetensors` with the current weights, and `model.json`.

    Fixed adapters that the run was trained on top of are in the file as well, before the trained ones, with their strengths.

    Returns:
        Size of the adapter file in bytes; 0 if nothing is attached.
    """
    stored = 0
    if saved := attachments(classifier.model) or attached:
        with writing(out, "adapter.safetensors"):
            origin = {"model": config.model, "data": data.source.where, **strengths_of(saved)}
            file = native.save(saved, out / "adapter.safetensors", provenance=origin)
        stored = file.stat().st_size
    write_json(out / "model.json", model_record(config, classifier, data.tasks))
    return stored


def run_record(
    config: TransferConfig,
    data: Data,
    classifier: Classifier,
    attached: Sequence[Attachment],
    result: TransferResult,
    metrics: Metrics,
) -> dict[str, Any]:
    """Metrics of a run, and everything they depend on."""
    best, validation = result.best, result.validation
    assert best is not None
    assert validation is not None
    key = data.objective.key
    return {
        f"test_{key}": metrics.score,
        "test_interval_95": list(metrics.interval),
        f"val_{key}": validation.score,
        "trainable_parameters": result.trainable,
        "test": metrics.as_dict(classifier.classes),
        "validation": {key: validation.score, "interval_95": list(validation.interval)},
        "chosen": asdict(best),
        "epochs": [asdict(epoch) for epoch in result.epochs],
        "training": {
            "steps": result.loop.steps,
            "resumed_from": result.loop.resumed_from,
            "seconds": result.loop.seconds,
            "peak_memory_bytes": result.loop.peak_memory_bytes,
            "cached_features": result.cached,
            "warnings": result.loop.warnings,
        },
        "methods": [_method(a) for a in attached],
        "data": {
            "where": data.source.where,
            "classes": list(classifier.classes),
            "pictures": {name: len(getattr(data.splits, name)) for name in ("train", "validation", "test")},
            "split_digest": data.splits.digest,
            "split_seed": data.splits.seed,
            "splits_made": list(data.splits.made),
            "shots": data.splits.shots,
            "notes": list(data.notes),
        },
        "model": {"name": classifier.name, "weights": classifier.weights, "input": dict(classifier.data)},
        "seed": config.seed,
        "config": asdict(config),
        "versions": {name: version(name) for name in ("veneer", "torch", "timm", "open_clip_torch")},
        "machine": {"python": platform.python_version(), "threads": torch.get_num_threads(), "system": platform.system()},
    }


def tidy(out: Path) -> None:
    """Removes the files that only an unfinished run needs: checkpoints, the best epoch's tensors, its curve, labels of images."""
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
    for name in ("best.safetensors", "curve.json", "pseudo_labels.json"):
        (out / name).unlink(missing_ok=True)


def model_record(config: TransferConfig, classifier: Classifier, tasks: Sequence[Task] = ()) -> dict[str, Any]:
    """The content of `model.json`: what `veneer predict` needs to open the model. `tasks`: of a run with several."""
    return {
        "form": FORM,
        "model": classifier.name,
        "weights": str(Path(config.weights).resolve()) if config.weights not in (None, "none") else config.weights,
        "weights_digest": classifier.weights,
        "classes": list(classifier.classes),
        "fresh_head": classifier.fresh,
        "size": config.size,
        "seed": config.seed,
        "squash": config.squash,
        "precision": config.mixed_precision,
        "templates": list(config.templates),
        "adapted": bool(config.names() or config.with_) or classifier.fresh,
        **({"multi_label": True} if config.multi_label else {}),
        **({"tasks": [task.as_dict() for task in tasks]} if tasks else {}),
    }


def _method(attachment: Attachment) -> dict[str, Any]:
    return {
        "name": attachment.method.name,
        "config": attachment.method.config(),
        "where": list(attachment.where),
        "sites": len(attachment.parts),
        "summary": attachment.method.summary(list(attachment.parts.values())),
        "parameters": sum(p.numel() for p in attachment.parameters()),
    }

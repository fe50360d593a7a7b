"""Result files of `veneer control train`: adapter files, metrics and an image grid."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from veneer import base_models
from veneer.atomic_files import write_json
from veneer.formats import formats, native
from veneer.injection import Attachment
from veneer.training.fixed_adapters import FixedAdapter, provenance_of
from veneer.training.loop.disk_space import optional, writing
from veneer.training.loop.distributed import whole_weights
from veneer.training.loop.trainer import TrainResult
from veneer.training.report.artifacts import training_record, write_image
from veneer.training.report.image_grid import GridRow, make_grid
from veneer.training.report.phases import PhaseReport
from veneer.training.report.png_metadata import SAMPLES, save_samples
from veneer.training.report.previews import PreviewSettings
from veneer.training.save_dtype import cast_to
from veneer.training.training_options import sampling_options

from .config import ControlConfig
from .evaluation import ControlMetrics, ControlSamples, Subject, generate_samples, measure_samples
from .image_embedding import Embedder
from .maps import maps
from .verdict import verdict

if TYPE_CHECKING:
    from veneer.training.loop.sharded_base import ShardedBase


@dataclass
class ControlRun:
    """A control run.

    Args:
        subjects: held-out images, the same in every evaluation. `embedder`: image encoder, for image embeddings.
        curve: step and metrics of the evaluations during training. `report`: reports the phase of the run.
        notes: warnings. `base`: the base model if it is sharded. `fixed`: adapters on top of which the run trains.
    """

    config: ControlConfig
    pipe: Any
    control: Attachment
    subjects: Sequence[Subject]
    embedder: Embedder | None
    out: Path
    curve: list[dict[str, Any]] = field(default_factory=list)
    report: PhaseReport = field(default_factory=PhaseReport)
    notes: list[str] = field(default_factory=list)
    base: ShardedBase | None = None
    fixed: Sequence[FixedAdapter] = ()

    def samples(self, subjects: Sequence[Subject], seeds: int, phase: str) -> list[ControlSamples]:
        """Generates images of subjects with the sampling settings of the base model's preset; `phase` is reported meanwhile."""
        count = self.report(phase, 3 * len(subjects) * seeds)
        preset = base_models.preset(self.config.base)
        settings = PreviewSettings(tuple(range(seeds)), preset.steps, preset.guidance_scale, preset.negative_prompt, batch=8)
        settings = sampling_options(settings, self.config)
        found = generate_samples(self.pipe, self.control, subjects, settings, self.config.strength, self.embedder, count)
        self.report.close()
        return found

    def measure(self, samples: Sequence[ControlSamples]) -> ControlMetrics:
        """Metrics of samples."""
        return measure_samples(samples, maps.get(str(self.config.condition)), self.config.features)


def write_maps(run: ControlRun) -> Path:
    """Writes `maps.png`: held-out images and their maps, for inspection before training."""
    rows = [GridRow(s.caption, ((s.image, s.map),)) for s in run.subjects[: run.config.grid_images]]
    path = run.out / "maps.png"
    write_image(make_grid(rows, title=f"images and maps: {run.config.condition}"), path)
    return path


def write_exports(run: ControlRun) -> None:
    """Writes `diffusers/`, which diffusers loads; for ControlNeXt, which diffusers does not support, `controlnext/` in the format
    of its authors.

    Nothing is written if trained base weights are not supported by the format.
    """
    authors = run.config.method == "controlnext"
    if any(not authors or component != "unet" for component, _ in run.control.extras.values()):
        return
    form, folder = formats.get(run.config.method)(), run.out / ("controlnext" if authors else "diffusers")
    form.save(run.control, folder if form.folder else folder / form.file)


def write_preview(run: ControlRun, step: int) -> None:
    """Evaluates held-out images with the current weights: writes `previews/step-000100.png` and adds a point to `curve.json`."""
    samples = run.samples(run.subjects[: max(2, run.config.grid_images)], 1, "previews")
    point = {"step": step, **run.measure(samples).as_dict()}
    run.curve[:] = [known for known in run.curve if known["step"] < step] + [point]
    write_json(run.out / "curve.json", run.curve)
    write_image(_image_grid(run, samples, f"step {step}"), run.out / "previews" / f"step-{step:06d}.png")


def write_files(run: ControlRun) -> None:
    """Writes the current weights: `adapter.safetensors`, and `diffusers/` or `controlnext/`."""
    config = run.config
    provenance = {
        "base": str(config.base), "condition": config.condition, "data": str(config.data or "generated by the base model"),
        "embedder": run.embedder.name if run.embedder else None, **provenance_of(run.fixed),
    }  # fmt: skip
    with whole_weights(run.base), cast_to([run.control], config.save_dtype):
        with writing(run.out, "adapter.safetensors"):
            native.save(run.control, run.out / "adapter.safetensors", provenance=provenance)
        optional(run.out, "the diffusers file", lambda: write_exports(run), run.notes)


def write_results(run: ControlRun, result: TrainResult) -> dict[str, Any]:
    """Writes the files, `sheet.png` and `result.json`; returns the content of the latter."""
    run.report("saving")
    write_files(run)
    run.report.close()
    config, metrics, records = run.config, None, []
    if run.subjects and config.eval_seeds:
        samples = run.samples(run.subjects, config.eval_seeds, "evaluating")
        metrics = run.measure(samples)
        shown = [sample for sample in samples if sample.seed < 2][: 2 * config.grid_images]
        first = [sample for sample in samples if sample.seed == 0][: config.grid_images]
        records = optional(run.out, SAMPLES, lambda: save_samples(run.out, _settings(run, first)), run.notes) or []
        grid = _image_grid(run, shown, str(metrics))
        optional(run.out, "sheet.png", lambda: write_image(grid, run.out / "sheet.png"), run.notes)
    record = {**_record(run, result, metrics), "samples": records}
    with writing(run.out, "result.json"):
        write_json(run.out / "result.json", record)
    return record


def _settings(run: ControlRun, samples: Sequence[ControlSamples]) -> list[tuple[Image.Image, dict[str, Any]]]:
    """Images with the condition, and their settings; before each its map, if the training images were generated."""
    images: list[tuple[Image.Image, dict[str, Any]]] = []
    for sample in samples:
        if run.config.data is None:
            images.append((sample.subject.map, {"map": str(run.config.condition)}))
        images.append((sample.followed, {"prompt": sample.subject.caption or "", "seed": sample.seed}))
    return images


def _image_grid(run: ControlRun, samples: Sequence[ControlSamples], note: str) -> Image.Image:
    rows = [
        GridRow(
            f"{d.subject.caption or 'no prompt'}, seed {d.seed}",
            ((d.subject.map,), (d.followed,), (d.free,), (d.other.map, d.misled)),
        )
        for d in samples
    ]
    heads = ("condition", "with condition", "without", "other condition, and with it")
    title = f"{run.config.method}, {run.config.condition}, on {run.config.base}"
    return make_grid(rows, title=title, note=note, columns=heads)


def _record(run: ControlRun, result: TrainResult, metrics: ControlMetrics | None) -> dict[str, Any]:
    return {
        "config": asdict(run.config),
        "parameters": sum(p.numel() for p in run.control.parameters()),
        "training": {**training_record(result), "warnings": [*result.warnings, *run.notes]},
        "phase_seconds": {**run.report.seconds_in, "training": result.seconds},
        "metrics": metrics.as_dict() if metrics else None,
        "verdict": verdict(metrics, result.losses, run.config).as_dict(),
        "held": len(run.subjects),
        "curve": run.curve,
        "versions": {name: version(name) for name in ("veneer", "torch", "diffusers", "transformers")},
        "machine": {"python": platform.python_version(), "system": platform.system()},
    }

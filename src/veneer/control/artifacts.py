"""What a run of `veneer control train` leaves: the attachment, what others load, the figures and a sheet of drawings."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from veneer import base_models
from veneer.formats import formats, native
from veneer.injection import Attachment
from veneer.training.loop.checkpoints import write_json
from veneer.training.loop.disk_space import optional, writing
from veneer.training.loop.trainer import TrainResult
from veneer.training.report.artifacts import training_record, write_image
from veneer.training.report.image_grid import Row, sheet
from veneer.training.report.phases import PhaseReport
from veneer.training.report.previews import PreviewSettings

from .config import ControlConfig
from .evaluation import Drawings, Figures, Subject, draw, figures
from .image_embedding import Embedder
from .maps import maps
from .verdict import verdict


@dataclass
class Run:
    """A run and what it works on.

    Args:
        subjects: held pictures, the same at every look. `embedder`: where pictures are followed.
        curve: what was measured on the way: step and figures. `report`: says which phase the run is in.
        notes: warnings of its end.
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

    def drawings(self, subjects: Sequence[Subject], seeds: int, phase: str) -> list[Drawings]:
        """Of some subjects, as the base is usually sampled; `phase` is what is reported meanwhile."""
        count = self.report(phase, 3 * len(subjects) * seeds)
        preset = base_models.preset(self.config.base)
        settings = PreviewSettings(tuple(range(seeds)), preset.steps, preset.guidance_scale, preset.negative_prompt, batch=8)
        found = draw(self.pipe, self.control, subjects, settings, self.config.strength, self.embedder, count)
        self.report.close()
        return found

    def measured(self, drawings: Sequence[Drawings]) -> Figures:
        """The figures of drawings."""
        return figures(drawings, maps.get(str(self.config.condition)), self.config.features)


def write_maps(run: Run) -> Path:
    """`maps.png`: held pictures and what will be followed, to look at before training."""
    rows = [Row(s.caption, ((s.picture, s.map),)) for s in run.subjects[: run.config.grid_images]]
    path = run.out / "maps.png"
    write_image(sheet(rows, title=f"pictures and their maps: {run.config.condition}"), path)
    return path


def write_for_others(run: Run) -> None:
    """`diffusers/`: what diffusers loads by itself; of ControlNeXt, which it has no class for, `controlnext/`: as its authors do.

    Nothing where base weights were trained that such files have no place for.
    """
    authors = run.config.method == "controlnext"
    if any(not authors or component != "unet" for component, _ in run.control.extras.values()):
        return
    form, folder = formats.get(run.config.method)(), run.out / ("controlnext" if authors else "diffusers")
    form.save(run.control, folder if form.folder else folder / form.file)


def look(run: Run, step: int) -> None:
    """A few held pictures with the weights of now: `previews/step-000100.png`, and a point of the curve in `curve.json`."""
    drawings = run.drawings(run.subjects[: max(2, run.config.grid_images)], 1, "previews")
    point = {"step": step, **run.measured(drawings).as_dict()}
    run.curve[:] = [known for known in run.curve if known["step"] < step] + [point]
    write_json(run.out / "curve.json", run.curve)
    write_image(_sheet(run, drawings, f"step {step}"), run.out / "previews" / f"step-{step:06d}.png")


def write_files(run: Run) -> None:
    """Write the weights of now: `adapter.safetensors`, and `diffusers/` or `controlnext/`."""
    config = run.config
    provenance = {
        "base": str(config.base), "condition": config.condition, "data": str(config.data or "drawn by the base"),
        "embedder": run.embedder.name if run.embedder else None,
    }  # fmt: skip
    with writing(run.out, "adapter.safetensors"):
        native.save(run.control, run.out / "adapter.safetensors", provenance=provenance)
    optional(run.out, "the file for diffusers", lambda: write_for_others(run), run.notes)


def write_outcome(run: Run, result: TrainResult) -> dict[str, Any]:
    """Write the files, `sheet.png` and `result.json`; gives what the latter holds."""
    run.report("saving")
    write_files(run)
    run.report.close()
    config, measured = run.config, None
    if run.subjects and config.eval_seeds:
        drawings = run.drawings(run.subjects, config.eval_seeds, "evaluating")
        measured = run.measured(drawings)
        shown = [d for d in drawings if d.seed < 2][: 2 * config.grid_images]
        grid = _sheet(run, shown, str(measured))
        optional(run.out, "sheet.png", lambda: write_image(grid, run.out / "sheet.png"), run.notes)
    record = _record(run, result, measured)
    with writing(run.out, "result.json"):
        write_json(run.out / "result.json", record)
    return record


def _sheet(run: Run, drawings: Sequence[Drawings], note: str) -> Image.Image:
    rows = [
        Row(
            f"{d.subject.caption or 'no words'}, seed {d.seed}",
            ((d.subject.map,), (d.followed,), (d.free,), (d.other.map, d.misled)),
        )
        for d in drawings
    ]
    heads = ("what is given", "with it", "without", "another's, and with that")
    title = f"{run.config.method}, {run.config.condition}, on {run.config.base}"
    return sheet(rows, title=title, note=note, columns=heads)


def _record(run: Run, result: TrainResult, measured: Figures | None) -> dict[str, Any]:
    return {
        "config": asdict(run.config),
        "parameters": sum(p.numel() for p in run.control.parameters()),
        "training": {**training_record(result), "warnings": [*result.warnings, *run.notes]},
        "phase_seconds": {**run.report.seconds_in, "training": result.seconds},
        "figures": measured.as_dict() if measured else None,
        "verdict": verdict(measured, result.losses, run.config).as_dict(),
        "held": len(run.subjects),
        "curve": run.curve,
        "versions": {name: version(name) for name in ("veneer", "torch", "diffusers", "transformers")},
        "machine": {"python": platform.python_version(), "system": platform.system()},
    }

"""Result files of a personalization run: adapter files, image grid, metrics and verdict."""

from __future__ import annotations

import functools
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from veneer import base_models
from veneer.atomic_files import write_atomically
from veneer.formats import diffusers as diffusers_format
from veneer.formats import embeddings, native
from veneer.injection.attachment.attachment import Attachment

from .. import attach_methods
from ..data.image_io import read_photo
from ..data.photo_folder import Photo
from ..families import family
from ..loop.disk_space import optional, writing
from ..loop.distributed import whole_weights
from ..loop.trainer import TrainResult
from ..save_dtype import cast_to
from .feature_models import features
from .image_grid import GridRow, before_after, make_grid
from .metrics import Metrics, measure
from .personalization_verdict import personal_verdict
from .phases import PhaseReport
from .png_metadata import SAMPLES, save_samples
from .previews import PreviewPair, PreviewSettings, generate_pairs, previews
from .progress import clock
from .verdict import read_verdict

if TYPE_CHECKING:
    from ..loop.sharded_base import ShardedBase
    from ..personalization_config import PersonalizeConfig

ADAPTER, GRID = "adapter.safetensors", "before_after.png"
GRID_PROMPTS = 4
"""Number of prompts on the image grid; the metrics use all."""


@dataclass(frozen=True)
class PersonalizationRun:
    """A personalization run: configuration, pipeline, adapters, photos, folder, phase report, warnings, and the base model if it
    is sharded."""

    config: PersonalizeConfig
    pipe: Any
    attached: Sequence[Attachment]
    photos: Sequence[Photo]
    out: Path
    report: PhaseReport = field(default_factory=PhaseReport)
    notes: list[str] = field(default_factory=list)
    base: ShardedBase | None = None

    def settings(self, seeds: int) -> PreviewSettings:
        """Sampling settings of the base model's preset."""
        preset = base_models.preset(self.config.base)
        return PreviewSettings(tuple(range(seeds)), preset.steps, preset.guidance_scale, preset.negative_prompt, batch=4)

    def previews(self, steps: int) -> int:
        """Number of preview images in a run of `steps` steps."""
        every = self.config.preview_every
        return steps // every * len(self.prompts[:GRID_PROMPTS]) if every else 0

    @property
    def prompts(self) -> list[str]:
        """Evaluation prompts, with the concept inserted."""
        return [p.replace("{concept}", self.config.concept) for p in self.config.prompts or ("{concept}",)]

    @property
    def base_words(self) -> dict[str, str]:
        """Replacement of the concept in prompts for the base model and text encoders, which do not know it."""
        return {self.config.concept: self.config.class_word} if self.config.class_word else {}


def write_preview(run: PersonalizationRun, step: int) -> Path:
    """Writes `previews/step-000100.png`: the prompts of the image grid with the current weights."""
    settings = run.settings(1)
    prompts = run.prompts[:GRID_PROMPTS]
    made = previews(run.pipe, prompts, settings, progress=run.report("previews", len(prompts)))
    rows = [GridRow(f"{p.prompt}, seed {p.seed}", ((p.image,),)) for p in made]
    path = run.out / "previews" / f"step-{step:06d}.png"
    write_image(make_grid(rows, title=f"step {step}", across=2), path)
    run.report.close()
    return path


def count_evaluation_images(config: PersonalizeConfig) -> int:
    """Number of images that a run generates for its metrics and image grid."""
    unrelated = len(config.drift_prompts or ()) if config.eval_seeds else 0
    return 2 * max(1, config.eval_seeds) * (len(config.prompts or ("",)) + unrelated)


def write_results(run: PersonalizationRun, result: TrainResult) -> dict[str, Any]:
    """Writes the files, `before_after.png` and `result.json`; returns the content of the latter, and the table as `scores`."""
    run.report("saving")
    files = write_files(run)
    config = run.config
    count = run.report("evaluating", count_evaluation_images(config))
    photos = [read_photo(p.path) for p in run.photos]
    settings = run.settings(max(1, config.eval_seeds))
    concept = generate_pairs(run.pipe, run.attached, run.prompts, settings, run.base_words, count)
    metrics = None
    if config.eval_seeds:
        unrelated = generate_pairs(run.pipe, run.attached, list(config.drift_prompts or ()), settings, progress=count)
        side = min(concept[0].adapted.size)
        metrics = measure(features(config.features), [shrink_to(p, side) for p in photos], concept, unrelated, run.base_words)
    run.report("saving")
    grid = _image_grid(run, result, photos, concept, metrics)
    optional(run.out, GRID, lambda: write_image(grid, run.out / GRID), run.notes)
    samples = optional(run.out, SAMPLES, lambda: _write_samples(run, concept), run.notes)
    run.report.close()
    record = {**_record(run, result, files, metrics), "samples": samples or []}
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str, allow_nan=False)
    with writing(run.out, "result.json"):
        write_atomically(run.out / "result.json", (text + "\n").encode())
    return {**record, "scores": str(metrics) if metrics else ""}


def final_message(run: PersonalizationRun, record: dict[str, Any]) -> str:
    """Message of a finished run: files, metrics, verdict, and the next command."""
    warnings = [f"warning: {text}" for text in record["training"]["warnings"]]
    prompt = shlex.quote(run.prompts[0])
    return "\n".join(
        [
            f"finished in {clock(run.report.elapsed)}; in {run.out}: {', '.join([*record['files'], GRID, 'result.json'])}",
            *warnings,
            *([str(record["scores"])] if record.get("scores") else []),
            read_verdict(record).text(),
            f"compare with the base model: veneer generate {prompt} --adapter {shlex.quote(str(run.out))} --side-by-side",
            f"upload with a model card: veneer push {shlex.quote(str(run.out))} USER/REPO",
        ]
    )


def write_files(run: PersonalizationRun) -> list[str]:
    """Writes the native file of all methods, and the files that diffusers loads."""
    with whole_weights(run.base), cast_to(run.attached, run.config.save_dtype):
        return _write_files(run)


def _write_files(run: PersonalizationRun) -> list[str]:
    provenance = _provenance(run)
    exported = {**provenance, "base": Path(provenance["base"]).name} if Path(provenance["base"]).exists() else provenance
    with writing(run.out, ADAPTER):
        native.save(run.attached, run.out / ADAPTER, provenance=provenance)
    files = [ADAPTER]
    for attachment in run.attached:
        if attach_methods.trains_token_embeddings(attachment.method):
            name, save = "learned_embeds.safetensors", embeddings.save
        elif attachment.method.name == "lora":
            name, save = "pytorch_lora_weights.safetensors", diffusers_format.save
        else:
            continue
        if optional(run.out, name, functools.partial(save, attachment, run.out / name, exported), run.notes) is not None:
            files.append(name)
    return files


def _write_samples(run: PersonalizationRun, concept: Sequence[PreviewPair]) -> list[dict[str, Any]]:
    """Writes the images of the image grid without the photos: one grid of base and adapted images, and one file per prompt."""
    prompts = run.prompts[:GRID_PROMPTS]
    pairs = [pair for pair in concept if pair.prompt in prompts]
    (run.out / SAMPLES).mkdir(exist_ok=True)
    heads = "base model", "with the adapter"
    write_image(before_after([], pairs, heads=heads), run.out / SAMPLES / "grid.png")
    first = [next(pair for pair in pairs if pair.prompt == prompt) for prompt in dict.fromkeys(prompts)]
    return save_samples(run.out, [(pair.adapted, {"prompt": pair.prompt, "seed": pair.seed}) for pair in first])


def _provenance(run: PersonalizationRun) -> dict[str, Any]:
    """Origin of the adapters, without a date: equal runs write equal files."""
    scheduler = getattr(run.pipe, "scheduler", None)
    facts = {
        "base": str(run.config.base),
        "concept": run.config.concept,
        "class_word": run.config.class_word,
        "resolution": run.config.resolution or family(run.pipe).resolution,
        "photos": len(run.photos),
        "trains_token": any(attach_methods.trains_token_embeddings(a.method) for a in run.attached),
        "prediction_type": scheduler.config.get("prediction_type") if scheduler is not None else None,
    }
    return {name: value for name, value in facts.items() if value is not None or name == "class_word"}


def _image_grid(
    run: PersonalizationRun, result: TrainResult, photos: list[Image.Image], concept: list[PreviewPair], metrics: Metrics | None
) -> Image.Image:
    config = run.config
    prompts = {*run.prompts[:GRID_PROMPTS]}
    trained = sum(p.numel() for a in run.attached for p in a.parameters())
    note = (
        f"{config.method} on {config.base}: {len(run.photos)} photos, {result.steps} steps, {result.seconds:.0f} s, "
        f"{trained:,} trainable parameters"
    )
    words = run.base_words
    heads = (f"base ('{next(iter(words.values()))}')" if words else "base", "with the adapter")
    return before_after(
        photos,
        [p for p in concept if p.prompt in prompts],
        title=f"{config.concept}",
        note=note,
        footer=str(metrics) if metrics else "",
        heads=heads,
    )


def _record(run: PersonalizationRun, result: TrainResult, files: list[str], metrics: Metrics | None) -> dict[str, Any]:
    return {
        "config": asdict(run.config),
        "files": files,
        "photos": [{"name": p.path.name, "digest": p.digest, "size": list(p.size)} for p in run.photos],
        "methods": [
            {
                "name": a.method.name,
                "config": a.method.config(),
                "where": list(a.where),
                "sites": len(a.parts),
                "parameters": sum(p.numel() for p in a.parameters()),
            }
            for a in run.attached
        ],
        "training": {
            **training_record(result),
            "learning_rate": run.config.loop().learning_rate,
            "resolution": run.config.resolution or family(run.pipe).resolution,
            "warnings": [*result.warnings, *run.notes],
        },
        "phase_seconds": {**run.report.seconds_in, "training": result.seconds},
        "metrics": metrics.as_dict() if metrics else None,
        "verdict": personal_verdict(metrics, run.config).as_dict(),
        "versions": {name: version(name) for name in ("veneer", "torch", "diffusers", "transformers")},
        "machine": {"python": platform.python_version(), "threads": torch.get_num_threads(), "system": platform.system()},
    }


def training_record(result: TrainResult) -> dict[str, Any]:
    """JSON record of a training; the loss is the mean of the last 50 steps."""
    last = result.losses[-50:]
    return {
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "loss": sum(last) / len(last) if last else None,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "warnings": result.warnings,
    }


def shrink_to(photo: Image.Image, side: int) -> Image.Image:
    """The photo reduced to a shorter side of at most `side` pixels, so that it is compared at the generated resolution."""
    factor = side / min(photo.size)
    size = round(photo.width * factor), round(photo.height * factor)
    return photo.resize(size, Image.Resampling.LANCZOS) if factor < 1 else photo


def write_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG atomically."""
    import io

    data = io.BytesIO()
    image.save(data, "PNG")
    write_atomically(path, data.getvalue())

"""What a run leaves behind: the files that others load, the sheet, and the figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .. import bases
from ..formats import diffusers as diffusers_format
from ..formats import embeddings, native
from ..injection.attachment import Attachment
from . import targets
from .checkpoints import write_atomically
from .features import features
from .folder import Photo
from .loop import TrainResult
from .metrics import Metrics, measure
from .personal_verdict import personal_verdict
from .photos import read_photo
from .previews import Pair, PreviewSettings, pairs, previews
from .sheets import Row, before_after, sheet

if TYPE_CHECKING:
    from .personal import PersonalizeConfig

SHOWN = 4
"""Prompts on the sheet; the figures use all."""


@dataclass(frozen=True)
class Run:
    """A run and what it works on."""

    config: PersonalizeConfig
    pipe: Any
    attached: Sequence[Attachment]
    photos: Sequence[Photo]
    out: Path

    def settings(self, seeds: int) -> PreviewSettings:
        """How pictures are made: as the base is usually sampled."""
        preset = bases.preset(self.config.base)
        return PreviewSettings(tuple(range(seeds)), preset.steps, preset.guidance_scale, preset.negative_prompt, batch=4)

    @property
    def prompts(self) -> list[str]:
        """Prompts with the concept in them."""
        return [p.replace("{concept}", self.config.concept) for p in self.config.prompts or ("{concept}",)]

    @property
    def base_words(self) -> dict[str, str]:
        """What stands for the concept where the base or a text model reads a prompt that it knows no such word of."""
        return {self.config.concept: self.config.class_word} if self.config.class_word else {}


def write_preview(run: Run, step: int) -> Path:
    """`previews/step-000100.png`: the sheet's prompts with the weights of now."""
    settings = run.settings(1)
    made = previews(run.pipe, run.prompts[:SHOWN], settings)
    rows = [Row(f"{p.prompt}, seed {p.seed}", ((p.image,),)) for p in made]
    path = run.out / "previews" / f"step-{step:06d}.png"
    write_image(sheet(rows, title=f"step {step}", across=2), path)
    return path


def write_outcome(run: Run, result: TrainResult) -> dict[str, Any]:
    """Write the files, `before_after.png` and `result.json`; gives what the latter holds."""
    files = write_files(run)
    config = run.config
    photos = [read_photo(p.path) for p in run.photos]
    settings = run.settings(max(1, config.eval_seeds))
    concept = pairs(run.pipe, run.attached, run.prompts, settings, run.base_words)
    metrics = None
    if config.eval_seeds:
        unrelated = pairs(run.pipe, run.attached, list(config.unrelated or ()), settings)
        side = min(concept[0].adapted.size)
        metrics = measure(features(config.features), [reduced(p, side) for p in photos], concept, unrelated, run.base_words)
    write_image(_sheet(run, result, photos, concept, metrics), run.out / "before_after.png")
    record = _record(run, result, files, metrics)
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str, allow_nan=False)
    write_atomically(run.out / "result.json", (text + "\n").encode())
    return record


def write_files(run: Run) -> list[str]:
    """The native file of everything, and beside it what diffusers loads by itself."""
    provenance = {"base": str(run.config.base), "concept": run.config.concept, "class_word": run.config.class_word}
    paths = [native.save(run.attached, run.out / "adapter.safetensors", provenance=provenance)]
    for attachment in run.attached:
        if targets.learns_words(attachment.method):
            paths.append(embeddings.save(attachment, run.out / "learned_embeds.safetensors"))
        elif attachment.method.name == "lora":
            paths.append(diffusers_format.save(attachment, run.out / "pytorch_lora_weights.safetensors"))
    return [Path(path).name for path in paths]


def _sheet(run: Run, result: TrainResult, photos: list[Image.Image], concept: list[Pair], metrics: Metrics | None) -> Image.Image:
    config = run.config
    shown = {*run.prompts[:SHOWN]}
    trained = sum(p.numel() for a in run.attached for p in a.parameters())
    note = (
        f"{config.method} on {config.base}: {len(run.photos)} photos, {result.steps} steps, {result.seconds:.0f} s, "
        f"{trained:,} trained values"
    )
    words = run.base_words
    heads = (f"base ('{next(iter(words.values()))}')" if words else "base", "with the adapter")
    return before_after(
        photos,
        [p for p in concept if p.prompt in shown],
        title=f"{config.concept}",
        note=note,
        footer=str(metrics) if metrics else "",
        heads=heads,
    )


def _record(run: Run, result: TrainResult, files: list[str], metrics: Metrics | None) -> dict[str, Any]:
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
        "training": training_record(result),
        "figures": metrics.as_dict() if metrics else None,
        "verdict": personal_verdict(metrics, run.config).as_dict(),
        "versions": {name: version(name) for name in ("veneer", "torch", "diffusers", "transformers")},
        "machine": {"python": platform.python_version(), "threads": torch.get_num_threads(), "system": platform.system()},
    }


def training_record(result: TrainResult) -> dict[str, Any]:
    """How a training went, for JSON; the loss is the mean of the last 50 steps."""
    last = result.losses[-50:]
    return {
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "loss": sum(last) / len(last) if last else None,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "warnings": result.warnings,
    }


def reduced(photo: Image.Image, side: int) -> Image.Image:
    """The photo with a short side of at most `side` pixels: likeness is to what a picture of that size can show."""
    factor = side / min(photo.size)
    size = round(photo.width * factor), round(photo.height * factor)
    return photo.resize(size, Image.Resampling.LANCZOS) if factor < 1 else photo


def write_image(image: Image.Image, path: Path) -> None:
    """A PNG, written whole or not at all."""
    import io

    data = io.BytesIO()
    image.save(data, "PNG")
    write_atomically(path, data.getvalue())

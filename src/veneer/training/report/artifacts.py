"""Result files of a personalization run: adapter files, image grid, metrics and verdict."""

from __future__ import annotations

import functools
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
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
from ..concepts.concept import Concept
from ..concepts.concept_verdict import concept_verdict, run_verdict
from ..concepts.evaluation import ConceptScores, measure_concepts
from ..data.image_io import read_photo
from ..data.photo_folder import Photo
from ..families import family
from ..fixed_adapters import provenance_of
from ..loop.disk_space import optional, writing
from ..loop.distributed import whole_weights
from ..loop.trainer import TrainResult
from ..loss_plot import LOSS_PLOT
from ..objective.validation_loss import validation_lines
from ..save_dtype import cast_to
from ..training_options import sampling_options
from .feature_models import features
from .image_grid import GridRow, before_after, make_grid, subject_rows
from .personalization_verdict import personal_verdict
from .phases import PhaseReport
from .png_metadata import SAMPLES, save_samples
from .previews import PreviewPair, PreviewSettings, generate_pairs, previews
from .progress import clock
from .verdict import Verdict, read_verdict

if TYPE_CHECKING:
    from ..loop.sharded_base import ShardedBase
    from ..personalization_config import PersonalizeConfig

ADAPTER, GRID = "adapter.safetensors", "before_after.png"
GRID_PROMPTS = 4
"""Number of prompts on the image grid; the metrics use all."""


@dataclass(frozen=True)
class PersonalizationRun:
    """A personalization run: configuration, pipeline, adapters, photos, folder, phase report, warnings, and the base model if it
    is sharded.

    Args:
        subjects: photos of each concept, if there are several.
        extra: further entries of `result.json`.
    """

    config: PersonalizeConfig
    pipe: Any
    attached: Sequence[Attachment]
    photos: Sequence[Photo]
    out: Path
    report: PhaseReport = field(default_factory=PhaseReport)
    notes: list[str] = field(default_factory=list)
    base: ShardedBase | None = None
    subjects: Mapping[Concept, Sequence[Photo]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def settings(self, seeds: int) -> PreviewSettings:
        """Sampling settings of the run, by default those of the base model's preset."""
        preset = base_models.preset(self.config.base)
        settings = PreviewSettings(tuple(range(seeds)), preset.steps, preset.guidance_scale, preset.negative_prompt, batch=4)
        return sampling_options(settings, self.config)

    def previews(self, steps: int) -> int:
        """Number of preview images in a run of `steps` steps."""
        every = self.config.preview_every
        return steps // every * len(self.grid_prompts) if every else 0

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The trained concepts."""
        return tuple(self.subjects) or (Concept(self.config.concept, self.config.class_word),)

    def photos_of(self, concept: Concept) -> Sequence[Photo]:
        """The photos of a concept."""
        return self.subjects.get(concept, self.photos)

    def prompts_of(self, concept: Concept) -> list[str]:
        """Evaluation prompts, with the concept inserted."""
        return [p.replace("{concept}", concept.token) for p in self.config.prompts or ("{concept}",)]

    @property
    def prompts(self) -> list[str]:
        """Evaluation prompts of all concepts."""
        return [prompt for concept in self.concepts for prompt in self.prompts_of(concept)]

    @property
    def grid_prompts(self) -> list[str]:
        """The prompts on the image grid and on previews: the first ones of each concept."""
        count = max(1, GRID_PROMPTS // len(self.concepts))
        return [prompt for concept in self.concepts for prompt in self.prompts_of(concept)[:count]]

    @property
    def base_words(self) -> dict[str, str]:
        """Replacement of the concepts in prompts for the base model and text encoders, which do not know them."""
        return {concept.token: concept.class_word for concept in self.concepts if concept.class_word}


def write_preview(run: PersonalizationRun, step: int) -> Path:
    """Writes `previews/step-000100.png`: the prompts of the image grid with the current weights."""
    settings = run.settings(1)
    prompts = run.grid_prompts
    made = previews(run.pipe, prompts, settings, progress=run.report("previews", len(prompts)))
    rows = [GridRow(f"{p.prompt}, seed {p.seed}", ((p.image,),)) for p in made]
    path = run.out / "previews" / f"step-{step:06d}.png"
    write_image(make_grid(rows, title=f"step {step}", across=2), path)
    run.report.close()
    return path


def count_evaluation_images(config: PersonalizeConfig, concepts: int = 1) -> int:
    """Number of images that a run generates for its metrics and image grid.

    Args:
        concepts: number of trained concepts.
    """
    unrelated = len(config.drift_prompts or ()) if config.eval_seeds else 0
    return 2 * max(1, config.eval_seeds) * (concepts * len(config.prompts or ("",)) + unrelated)


def write_results(run: PersonalizationRun, result: TrainResult) -> dict[str, Any]:
    """Writes the files, `before_after.png` and `result.json`; returns the content of the latter, and the table as `scores`."""
    run.report("saving")
    files = write_files(run)
    config = run.config
    count = run.report("evaluating", count_evaluation_images(config, len(run.concepts)))
    photos = {concept: [read_photo(p.path) for p in run.photos_of(concept)] for concept in run.concepts}
    settings = run.settings(max(1, config.eval_seeds))
    pairs = {c: generate_pairs(run.pipe, run.attached, run.prompts_of(c), settings, run.base_words, count) for c in run.concepts}
    scores = list[ConceptScores]()
    if config.eval_seeds:
        unrelated = generate_pairs(run.pipe, run.attached, list(config.drift_prompts or ()), settings, progress=count)
        side = min(next(iter(pairs.values()))[0].adapted.size)
        small = {concept: [shrink_to(photo, side) for photo in own] for concept, own in photos.items()}
        scores = measure_concepts(features(config.features), small, pairs, unrelated)
    text = _scores_text(scores)
    run.report("saving")
    grid = _image_grid(run, result, photos, pairs, text)
    optional(run.out, GRID, lambda: write_image(grid, run.out / GRID), run.notes)
    samples = optional(run.out, SAMPLES, lambda: _write_samples(run, pairs), run.notes)
    run.report.close()
    record = {**_record(run, result, files), **_evaluation(run, scores), "samples": samples or [], **run.extra}
    content = json.dumps(record, indent=2, ensure_ascii=False, default=str, allow_nan=False)
    with writing(run.out, "result.json"):
        write_atomically(run.out / "result.json", (content + "\n").encode())
    return {**record, "scores": text}


def _scores_text(scores: Sequence[ConceptScores]) -> str:
    return "\n".join(map(str, scores)) if len(scores) > 1 else "\n".join(str(each.metrics) for each in scores)


def _evaluation(run: PersonalizationRun, scores: Sequence[ConceptScores]) -> dict[str, Any]:
    """Metrics and verdict of the run; with several concepts those of each, and no common metrics."""
    if len(run.concepts) == 1:
        metrics = scores[0].metrics if scores else None
        return {"metrics": metrics and metrics.as_dict(), "verdict": personal_verdict(metrics, run.config).as_dict()}
    verdicts: dict[str, Verdict] = {each.concept.token: concept_verdict(each, run.config) for each in scores}
    verdict = run_verdict(verdicts) if verdicts else personal_verdict(None, run.config)
    concepts = [{**each.as_dict(), "verdict": verdicts[each.concept.token].as_dict()} for each in scores]
    return {"metrics": None, "concepts": concepts or [asdict(c) for c in run.concepts], "verdict": verdict.as_dict()}


def final_message(run: PersonalizationRun, record: dict[str, Any]) -> str:
    """Message of a finished run: files, metrics, verdict, and the next command."""
    warnings = [f"warning: {text}" for text in record["training"]["warnings"]]
    prompt = shlex.quote(run.prompts[0])
    names = [*record["files"], GRID, *([LOSS_PLOT] if record.get("validation") else []), "result.json"]
    adapters = " ".join(shlex.quote(text) for text in (*run.config.with_, str(run.out)))
    return "\n".join(
        [
            f"finished in {clock(run.report.elapsed)}; in {run.out}: {', '.join(names)}",
            *warnings,
            *([str(record["scores"])] if record.get("scores") else []),
            *validation_lines(record.get("validation", [])),
            read_verdict(record).text(),
            f"compare with the base model: veneer generate {prompt} --adapter {adapters} --side-by-side",
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


def _write_samples(run: PersonalizationRun, made: Mapping[Concept, Sequence[PreviewPair]]) -> list[dict[str, Any]]:
    """Writes the images of the image grid without the photos: one grid of base and adapted images, and one file per prompt."""
    prompts = run.grid_prompts
    pairs = [pair for own in made.values() for pair in own if pair.prompt in prompts]
    (run.out / SAMPLES).mkdir(exist_ok=True)
    heads = "base model", "with the adapter"
    write_image(before_after([], pairs, heads=heads), run.out / SAMPLES / "grid.png")
    first = [next(pair for pair in pairs if pair.prompt == prompt) for prompt in dict.fromkeys(prompts)]
    return save_samples(run.out, [(pair.adapted, {"prompt": pair.prompt, "seed": pair.seed}) for pair in first])


def _provenance(run: PersonalizationRun) -> dict[str, Any]:
    """Origin of the adapters, without a date: equal runs write equal files."""
    scheduler = getattr(run.pipe, "scheduler", None)
    facts: dict[str, Any] = {
        "base": str(run.config.base),
        "concept": run.config.concept,
        "class_word": run.config.class_word,
        "resolution": run.config.resolution or family(run.pipe).resolution,
        "photos": len(run.photos),
        "trains_token": any(attach_methods.trains_token_embeddings(a.method) for a in run.attached),
        "prediction_type": scheduler.config.get("prediction_type") if scheduler is not None else None,
    }
    if len(run.concepts) > 1:
        facts["concepts"] = {concept.token: concept.class_word for concept in run.concepts}
    known = {name: value for name, value in facts.items() if value is not None or name == "class_word"}
    return {**known, **provenance_of(run.config.with_)}


def _image_grid(
    run: PersonalizationRun,
    result: TrainResult,
    photos: Mapping[Concept, list[Image.Image]],
    pairs: Mapping[Concept, list[PreviewPair]],
    footer: str,
) -> Image.Image:
    config = run.config
    prompts = {*run.grid_prompts}
    trained = sum(p.numel() for a in run.attached for p in a.parameters())
    note = (
        f"{config.method} on {config.base}: {len(run.photos)} photos, {result.steps} steps, {result.seconds:.0f} s, "
        f"{trained:,} trainable parameters"
    )
    some = {concept: [pair for pair in own if pair.prompt in prompts] for concept, own in pairs.items()}
    words = run.base_words
    if len(some) == 1:
        concept = next(iter(some))
        heads = (f"base ('{next(iter(words.values()))}')" if words else "base", "with the adapter")
        return before_after(photos[concept], some[concept], title=concept.token, note=note, footer=footer, heads=heads)
    rows = [row for c, own in some.items() for row in subject_rows(photos[c], own, label=f"photos of {c.token}")]
    title = " and ".join(concept.token for concept in some)
    return make_grid(rows, title=title, note=note, columns=("base (class words)", "with the adapter"), footer=footer)


def _record(run: PersonalizationRun, result: TrainResult, files: list[str]) -> dict[str, Any]:
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

"""Result files of a personalization run: adapter files, image grid, metrics and verdict."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from veneer.atomic_files import write_atomically

from ..concepts.concept import Concept
from ..concepts.concept_verdict import concept_verdict, run_verdict
from ..concepts.evaluation import ConceptScores, measure_concepts
from ..data.image_io import read_photo
from ..evaluation.adapter_output import write_files
from ..evaluation.personalization_run import PersonalizationRun
from ..families import family
from ..loop.disk_space import optional, writing
from ..loop.trainer import TrainResult
from ..loss_plot import LOSS_PLOT
from ..objective.validation_loss import validation_lines
from .feature_models import features
from .image_grid import GridRow, before_after, make_grid, subject_rows
from .personalization_verdict import personal_verdict
from .png_metadata import SAMPLES, save_samples
from .previews import PreviewPair, generate_pairs, previews
from .progress import clock
from .verdict import Verdict, read_verdict

GRID = "before_after.png"


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


def write_results(run: PersonalizationRun, result: TrainResult) -> dict[str, Any]:
    """Writes the files, `before_after.png` and `result.json`; returns the content of the latter, and the table as `scores`."""
    run.report("saving")
    files = write_files(run)
    photos = {concept: [read_photo(p.path) for p in run.photos_of(concept)] for concept in run.concepts}
    pairs, scores = _evaluate(run, photos)
    text = _scores_text(scores)
    run.report("saving")
    samples = None
    if pairs:
        grid = _image_grid(run, result, photos, pairs, text)
        optional(run.out, GRID, lambda: write_image(grid, run.out / GRID), run.notes)
        samples = optional(run.out, SAMPLES, lambda: _write_samples(run, pairs), run.notes)
    run.report.close()
    record = {**_record(run, result, files), **_evaluation(run, scores), "samples": samples or [], **run.extra}
    content = json.dumps(record, indent=2, ensure_ascii=False, default=str, allow_nan=False)
    with writing(run.out, "result.json"):
        write_atomically(run.out / "result.json", (content + "\n").encode())
    return {**record, "scores": text}


def _evaluate(
    run: PersonalizationRun, photos: Mapping[Concept, list[Image.Image]]
) -> tuple[dict[Concept, list[PreviewPair]], list[ConceptScores]]:
    """Images of the prompts of each concept, and their scores; both empty if nothing is evaluated."""
    evaluation = run.evaluation
    if evaluation.kind == "none":
        return {}, []
    count = run.report("evaluating", evaluation.images(len(run.concepts)))
    settings = run.settings(max(1, evaluation.seeds))
    prompts = {concept: run.evaluation_prompts(concept) for concept in run.concepts}
    pairs = {c: generate_pairs(run.pipe, run.attached, own, settings, run.base_words, count) for c, own in prompts.items()}
    if not evaluation.seeds:
        return pairs, []
    unrelated = generate_pairs(run.pipe, run.attached, list(evaluation.drift_prompts), settings, progress=count)
    side = min(next(iter(pairs.values()))[0].adapted.size)
    small = {concept: [shrink_to(photo, side) for photo in own] for concept, own in photos.items()}
    return pairs, measure_concepts(features(run.config.features), small, pairs, unrelated)


def _scores_text(scores: Sequence[ConceptScores]) -> str:
    return "\n".join(map(str, scores)) if len(scores) > 1 else "\n".join(str(each.metrics) for each in scores)


def _evaluation(run: PersonalizationRun, scores: Sequence[ConceptScores]) -> dict[str, Any]:
    """Metrics and verdict of the run; with several concepts those of each, and no common metrics."""
    config = replace(run.config, eval=run.evaluation.kind)
    if len(run.concepts) == 1:
        metrics = scores[0].metrics if scores else None
        return {"metrics": metrics and metrics.as_dict(), "verdict": personal_verdict(metrics, config).as_dict()}
    verdicts: dict[str, Verdict] = {each.concept.token: concept_verdict(each, config) for each in scores}
    verdict = run_verdict(verdicts) if verdicts else personal_verdict(None, config)
    concepts = [{**each.as_dict(), "verdict": verdicts[each.concept.token].as_dict()} for each in scores]
    return {"metrics": None, "concepts": concepts or [asdict(c) for c in run.concepts], "verdict": verdict.as_dict()}


def final_message(run: PersonalizationRun, record: dict[str, Any]) -> str:
    """Message of a finished run: files, metrics, verdict, and the next command."""
    warnings = [f"warning: {text}" for text in record["training"]["warnings"]]
    prompt = shlex.quote(run.prompts[0])
    grid = [GRID] if run.evaluation.kind != "none" else []
    names = [*record["files"], *grid, *([LOSS_PLOT] if record.get("validation") else []), "result.json"]
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


def _write_samples(run: PersonalizationRun, made: Mapping[Concept, Sequence[PreviewPair]]) -> list[dict[str, Any]]:
    """Writes the images of the image grid without the photos: one grid of base and adapted images, and two files per prompt.

    `00.png` is of the adapted model, and `base-00.png` is of the base model from the same noise.
    """
    prompts = run.grid_prompts
    pairs = [pair for own in made.values() for pair in own if pair.prompt in prompts]
    (run.out / SAMPLES).mkdir(exist_ok=True)
    heads = "base model", "with the adapter"
    write_image(before_after([], pairs, heads=heads), run.out / SAMPLES / "grid.png")
    first = {pair.prompt: pair for pair in reversed(pairs)}
    chosen = [first[prompt] for prompt in dict.fromkeys(prompts) if prompt in first]
    for index, pair in enumerate(chosen):
        write_image(pair.base, run.out / SAMPLES / f"base-{index:02d}.png")
    return save_samples(run.out, [(pair.adapted, {"prompt": pair.prompt, "seed": pair.seed}) for pair in chosen])


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

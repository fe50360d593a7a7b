"""Tables of a model card: settings, scores and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .hub_origin import public_file
from .run_record import RunRecord

HIDDEN = frozenset({
    "base", "model", "method", "options", "concept", "class_word", "steps",
    "photos", "data", "datasets", "weights", "unlabeled", "init_from", "with_", "cache_folder", "features", "out",
    "prompts", "drift_prompts", "eval", "eval_seeds", "grid_images", "validation_every", "preview_every", "preview_steps",
    "preview_scheduler", "checkpoint_every", "resume", "dry_run", "check", "tracker", "cache", "workers",
})  # fmt: skip
"""Entries of a config that the table of settings leaves out: those in other parts of the card, paths, evaluation, bookkeeping."""
PAIRED = {
    "similarity": "similarity to the photos",
    "nearest": "similarity to the nearest photo",
    "prompt_similarity": "similarity to the prompt",
}
SINGLE = {
    "ceiling": "similarity of the photos to one another",
    "drift": "change of unrelated prompts",
    "pixel_drift": "the same, in pixels",
}
CONTENTS = {
    "adapter.safetensors": "all methods of the run, for veneer",
    "pytorch_lora_weights.safetensors": "LoRA for diffusers",
    "learned_embeds.safetensors": "token embedding for diffusers, A1111 and ComfyUI",
    "model.json": "classes and input of the classifier, for veneer",
}

Row = tuple[str, ...]


def table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def setting_rows(run: RunRecord) -> list[Row]:
    """Base model, adapters, steps and the set options of a run."""
    training, config = run.record.get("training", {}), run.config
    rows = [("base model", run.base_label)]
    for each in run.record.get("methods", ()):
        options = ", ".join(f"{name} {_plain(value)}" for name, value in _set_options(each["config"]))
        rows.append((f"`{each['name']}`", f"{each['parameters']:,} parameters at {each['sites']} sites; {options}".rstrip("; ")))
    count = run.record.get("parameters") or run.record.get("trainable_parameters")
    rows += [("trainable parameters", f"{count:,}")] if count else []
    rows += [("steps", f"{training['steps']:,}")] if training.get("steps") else []
    rows += [(name.replace("_", " "), _plain(value)) for name, value in _settings(config, training).items()]
    versions = run.record.get("versions", {})
    return [*rows, ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]


def score_rows(run: RunRecord) -> tuple[Sequence[Row], str]:
    """Scores with their 95 % intervals, and a note on what they are; no rows if the run was not evaluated."""
    if run.kind == "transfer":
        record, validation, (metric, key) = run.record, run.record["validation"], run.metric
        return [
            (f"test {metric}", f"{record[f'test_{key}']:.1%}", _interval(record["test_interval_95"], ".1%")),
            (f"validation {metric}", f"{validation[key]:.1%}", _interval(validation["interval_95"], ".1%")),
        ], f"{record['data']['pictures']['test']:,} test images, evaluated once; the epoch was chosen on the validation split."
    if run.kind == "personalize":
        return _concept_scores(run)
    metrics = run.record.get("metrics")
    if not metrics:
        return [], ""
    rows = [
        (f"{metrics['measure']}, with the condition", f"{metrics['followed']:.3f}", ""),
        ("without", f"{metrics['free']:.3f}", _difference(metrics["over_free"])),
        ("with another image's condition", f"{metrics['misled']:.3f}", _difference(metrics["over_misled"])),
    ]
    return (
        rows,
        f"Means over {metrics['count']} images of each kind, of held-out conditions; intervals are of the gain over the row.",
    )


def _concept_scores(run: RunRecord) -> tuple[Sequence[Row], str]:
    """Scores of each concept, with the margin over the photos of the others."""
    concepts = [each for each in run.concepts if each.get("metrics")]
    if not concepts:
        return [], ""
    rows: list[Row] = []
    for each in concepts:
        head = f"`{each['token']}`: " if len(run.concepts) > 1 else ""
        rows += [(head + label, *cells) for label, *cells in _personal_rows(each["metrics"])]
        for other, confusion in each.get("confusion", {}).items():
            margin = confusion["margin"]
            label = f"{head}similarity to its photos minus that to the photos of `{other}`"
            rows.append((label, f"{margin['mean']:+.3f}", _interval((margin["low"], margin["high"]), "+.3f")))
    return rows, (
        f"Features: {concepts[0]['metrics']['features']}. Means over images of the same prompts and seeds with and without the "
        "adapter; near 1, the similarity to the nearest photo means a copy."
    )


def file_rows(files: Mapping[str, int]) -> Sequence[Row]:
    """Name, size and content of each weights file and config."""
    rows = []
    for name, size in files.items():
        if name.endswith(".png"):
            continue
        usual = "for ComfyUI, A1111 and Forge" if name.startswith("comfyui/") else "for diffusers" if "/" in name else ""
        rows.append((f"`{name}`", f"{size:,} bytes", CONTENTS.get(name, usual)))
    return rows


def _personal_rows(metrics: Mapping[str, Any]) -> Iterator[Row]:
    for name, label in PAIRED.items():
        if pair := metrics.get(name):
            yield label, f"{pair['adapted']['mean']:.3f}", _interval((pair["adapted"]["low"], pair["adapted"]["high"]))
            yield f"{label}: base model", f"{pair['base']['mean']:.3f}", _interval((pair["base"]["low"], pair["base"]["high"]))
            yield f"{label}: gain", f"{pair['gain']['mean']:+.3f}", _interval((pair["gain"]["low"], pair["gain"]["high"]), "+.3f")
    for name, label in SINGLE.items():
        if mean := metrics.get(name):
            yield label, f"{mean['mean']:.3f}", _interval((mean["low"], mean["high"]))


def _interval(ends: Sequence[float | None], form: str = ".3f") -> str:
    low, high = ends
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _difference(found: Sequence[float | None]) -> str:
    """Interval of a mean difference from the mean and half the interval."""
    mean, half = found
    return "" if mean is None or half is None else f"{mean - half:+.3f} to {mean + half:+.3f}"


def _settings(config: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a config without those in `HIDDEN`; learning rate and resolution, if not set, as the run completed them."""
    settings = {"method": config["method"], **{name: value for name, value in config.items() if name not in HIDDEN}}
    for name in ("learning_rate", "resolution"):
        settings[name] = settings.get(name) or training.get(name)
    if isinstance(config.get("validation"), str):  # a folder; of other commands, a share
        del settings["validation"]
    if not config.get("class_images"):
        settings.pop("prior_loss_weight", None)
    if config.get("data") is not None:
        settings.pop("generated_images", None)
    settings["quantize"] = [_quantization(text) for text in config.get("quantize") or ()]
    switches = {name: value for name, value in settings.items() if isinstance(value, bool)}
    shown = dict(_set_options(settings)) | switches | {"seed": str(config.get("seed", 0))}
    return {name: shown[name] for name in settings if name in shown}


def _quantization(text: str) -> str:
    """A kind or GGUF file, without the folders of the file."""
    component, sign, kind = text.rpartition("=")
    return component + sign + public_file(kind)


def _set_options(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Options that are neither empty nor disabled."""
    return [(name, value) for name, value in options.items() if value not in (None, False, 0, "", "no", "none", [], {}, ())]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(own)}" for name, own in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else "yes" if value is True else "no" if value is False else str(value)

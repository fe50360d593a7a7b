"""Training requests of the page Train: presets, the command, and estimates of time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from veneer import base_models, methods
from veneer.base_models.loading import find
from veneer.base_models.quantized_linear import KINDS
from veneer.injection import OptionError
from veneer.training import attach_methods
from veneer.training.loop.config import PRESETS, preset_steps
from veneer.training.method_names import SHORTHANDS, split_methods
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.preflight.estimates import size
from veneer.training.preflight.optimizer_state import STATES

from ...base_access import check_access
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, check_text
from ..methods.availability import check_photo_method, photo_methods
from ..shared.config_form import Field, fields_of, flags_of, with_choices
from ..shared.time_estimates import REFERENCE, Timing, duration, measure_timing
from ..shared.verdict import read_result
from .adapter_sources import AdapterSources
from .concept_groups import ConceptGroup, check_groups, dataset_flags
from .other_options import other_flags

DEFAULT_METHOD = "pivotal"
"""Method selected by default; it reaches the highest similarity in a short time."""
EVAL_SEEDS = {"quick": "2", "balanced": "3", "thorough": "3"}
"""Preset to evaluation seeds per prompt; intervals need at least 2, and the verdict `learned` needs intervals."""
PREVIEWS, CHECKPOINTS = 6, 4
"""Number of previews and checkpoints per run."""
REFERENCE_TIMINGS = {"pivotal": Timing(0.09, 35.0, REFERENCE), "lora": Timing(0.09, 35.0, REFERENCE)}
"""Timings of the bundled base model, used before the first run."""
MAIN = ("steps", "batch", "learning_rate", "resolution", "schedule", "seed")
MORE = (
    "where", "text_encoder", "class_images", "caption_dropout", "crop", "flip", "buckets", "optimizer", "weight_decay", "ema",
    "min_snr_gamma", "dtype", "quantize", "offload_encoders", "mixed_precision", "gradient_checkpointing", "save_dtype",
    "preview_every", "checkpoint_every", "eval_seeds",
)  # fmt: skip
SETTINGS = with_choices(fields_of(PersonalizeConfig, [*MAIN, *MORE]), {"quantize": tuple(KINDS)})
MINIMUM = {"steps": 1, "batch": 1, "resolution": 8, "class_images": 0, "preview_every": 0, "checkpoint_every": 0, "eval_seeds": 0}
"""Minimum of each setting; for the command, 0 steps and 0 images mean the default."""
FROM_CONCEPT = ("tokens", "initialize", "ids")
"""Options hidden from the form: they are derived from the concept."""


@dataclass(frozen=True)
class PersonalizeRequest:
    """Unchecked values of the form; `command` validates them.

    Args:
        other: options without a field, as TOML; see `other_options`. `sources`: adapters that the run builds on.
        groups: further concepts, with their photos.
    """

    concept: str
    class_word: str
    base: str
    method: str
    settings: Sequence[Any]
    options: Sequence[Any]
    other: str = ""
    sources: AdapterSources = field(default_factory=AdapterSources)
    groups: tuple[ConceptGroup, ...] = ()


def method_names(include_untuned: bool, base: str = "bundled") -> list[str]:
    """Methods to choose from: the default first, then those with presets for the bundled base model.

    Args:
        include_untuned: also list every other method with sites in the base model, which is slow the first time.
    """
    tuned = tuned_methods()
    others = [name for name in photo_methods(check_base(base)) if name not in tuned] if include_untuned else []
    return [*SHORTHANDS, *tuned, *others]


def tuned_methods() -> list[str]:
    """Methods with a preset for the bundled base model."""
    return [name for name in base_models.preset("bundled").training if not methods.get(name).conditions]


def main_method(method: str) -> str:
    """Of combined methods, the one whose options the form shows.

    Raises:
        VeneerError: unknown method.
    """
    return split_methods(check_text(method, "method"))[-1]


def options_of(method: str) -> list[Field]:
    """Form fields of a method's options."""
    kind: Any = methods.get(main_method(method))
    return fields_of(kind, skip=FROM_CONCEPT if attach_methods.trains_token_embeddings(kind) else ())


def check_base(name: str) -> str:
    """Checks the name of a base model: bundled, a folder, or a name on the Hub.

    Raises:
        VeneerError: no such base model, or one that visitors may not name.
    """
    base = check_access(check_text(name, "base") or "bundled")
    find(base)
    return base


def preset_settings(preset: str, base: str, method: str) -> dict[str, str]:
    """Settings of a preset by name; the others keep their defaults."""
    named: dict[str, Any] = {"base": check_base(base), "method": check_text(method, "method")}
    config = PersonalizeConfig(photos=Path(), concept="x", out=Path(), **named).with_defaults()
    steps = preset_steps(preset, config.steps or 500)
    return {
        "steps": str(steps),
        "batch": str(config.batch),
        "learning_rate": f"{config.main_rate():g}",
        "schedule": str(config.schedule),
        "seed": "0",
        "preview_every": str(max(1, steps // PREVIEWS)),
        "checkpoint_every": str(max(1, steps // CHECKPOINTS)),
        "eval_seeds": EVAL_SEEDS.get(preset, "3"),
    }


def default_options(base: str, method: str) -> Mapping[str, Any]:
    """Preset options of a method for a base model."""
    options: Mapping[str, Any] = base_models.preset(check_base(base)).training.get(main_method(method), {}).get("options", {})
    return options


def command(request: PersonalizeRequest, photos: Path, more: Sequence[Path] = ()) -> list[str]:
    """Command line of a training request.

    Args:
        photos: folder with those of the concept. `more`: with those of each group (default: `photos`, to validate a request).
    Raises:
        VeneerError: a value that the command would reject, or one beyond the limits.
    """
    concept, method = check_text(request.concept, "concept"), check_text(request.method, "method")
    if not concept:
        message = "the concept is empty; expected a new, unique name such as <toy>."
        raise OptionError(message, option="concept", given="")
    name, base = main_method(method), check_base(request.base)
    for each in split_methods(method):
        if each not in tuned_methods():
            check_photo_method(each, base)
    settings = flags_of(PersonalizeConfig, SETTINGS, request.settings)
    options = flags_of(methods.get(name), options_of(method), request.options, name)
    word = check_text(request.class_word, "class word")
    values = {"concept": concept, "class-word": word, "base": base, "method": method}
    _check_bounds(settings)
    flags = [f"--{key}={value}" for key, value in values.items() if value]
    check_groups(concept, request.groups)
    data = [str(photos)]
    if request.groups:
        data = dataset_flags(concept, word, request.groups, [photos, *(more or [photos] * len(request.groups))])
    others = [*other_flags(request.other, method), *request.sources.flags()]
    return ["personalize", *data, *flags, *settings, *options, *others, "--tracker=none"]


def _check_bounds(settings: Sequence[str]) -> None:
    """Checks settings against the limits of the app."""
    values = dict(word.removeprefix("--").split("=", 1) for word in settings if word.startswith("--") and "=" in word)
    most = {
        "resolution": LIMITS.side,
        "class_images": LIMITS.images * 16,
        "batch": LIMITS.photos,
        "eval_seeds": LIMITS.images,
    }
    for name, limit in most.items():
        text = values.get(name.replace("_", "-"), "0")
        if int(text) > limit:
            message = f"{name.replace('_', ' ')}: {text}; expected at most {limit}."
            raise OptionError(message, option=name, given=int(text), expected=limit)
    for name, low in MINIMUM.items():
        text = values.get(name.replace("_", "-"), str(low))
        if int(text) < low:
            message = f"{name.replace('_', ' ')}: {text}; expected at least {low}."
            raise OptionError(message, option=name, given=int(text), expected=low)
    if float(values.get("learning-rate", "1")) <= 0:
        rate = values["learning-rate"]
        raise OptionError(f"learning rate: {rate}; expected more than 0.", option="learning_rate", given=float(rate), expected=0)


def estimate(
    workspace: Workspace | None, base: str, method: str, steps: str, batch: str, optimizer: str = "adamw", eval_seeds: str = ""
) -> str:
    """Estimated time and memory of a run, from the last similar run or reference timings and the size of the base model."""
    previous = _similar_run(workspace, check_base(base), method) if workspace else None
    timing = _timing(previous, check_base(base), method)
    memory = _memory(check_base(base), previous, optimizer or "adamw")
    return f"Estimate: {_time(timing, steps, batch, _eval_share(eval_seeds))} {memory}"


def preset_choices(base: str, method: str, workspace: Workspace | None = None) -> list[tuple[str, str]]:
    """Choices of the preset field: label with steps and minutes, and name."""
    timing = _timing(_similar_run(workspace, check_base(base), method) if workspace else None, check_base(base), method)
    choices = []
    for preset in PRESETS:
        settings = preset_settings(preset, base, method)
        images = int(settings["steps"]) * int(settings["batch"])
        minutes = f", {duration(timing.seconds(images, _eval_share(settings['eval_seeds'])))}" if timing else ""
        choices.append((f"{preset}: {settings['steps']} steps{minutes}", preset))
    return choices


def _similar_run(workspace: Workspace, base: str, method: str) -> Job | None:
    """Newest finished job with this base model and method, else with this base model."""
    done = [job for job in workspace.all_jobs() if f"--base={base}" in job.command and job.state == "done"]
    same = [job for job in done if f"--method={method}" in job.command]
    return next(iter([*same, *done]), None)


def _eval_share(eval_seeds: Any) -> float:
    """Size of the evaluation relative to the reference timing."""
    text = str(eval_seeds)
    return int(text) / int(EVAL_SEEDS["balanced"]) if text.isdecimal() else 1.0


def _timing(previous: Job | None, base: str, method: str) -> Timing | None:
    config = (read_result(previous).get("config") or {}) if previous else {}
    if previous and (measured := measure_timing(previous, int(config.get("batch") or 1), _eval_share(config.get("eval_seeds")))):
        return measured
    return REFERENCE_TIMINGS.get(method, REFERENCE_TIMINGS[DEFAULT_METHOD]) if base == "bundled" else None


def _time(timing: Timing | None, steps: str, batch: str, share: float) -> str:
    if timing is None or not (steps.isdecimal() and batch.isdecimal()):
        return "the time is known after the first steps."
    return f"{duration(timing.seconds(int(steps) * int(batch), share))} in all, {timing.source}."


def _memory(base: str, previous: Job | None, optimizer: str) -> str:
    values = parameters(base)
    if not values:
        return "Memory is known once the base model has been downloaded."
    trained = sum(int(m.get("parameters", 0)) for m in read_result(previous).get("methods", [])) if previous else 0
    more = trained * (8 + STATES.get(optimizer, 8))
    rest = f" and {size(round(more))} for the trained parameters, plus" if more else ", plus trained parameters and"
    base_has = f"{size(4 * values)} for the base model ({values / 1e6:,.1f} million parameters)"
    return f"Memory: about {base_has}{rest} activations."


def parameters(base: str) -> int:
    """Number of parameters of a base model in a local folder; 0 for one on the Hub."""
    folder = find(base)
    if not isinstance(folder, Path):
        return 0
    files = [path for path in folder.glob("*/*.safetensors") if ".fp16." not in path.name]
    return sum(map(_count_parameters, files))


def _count_parameters(path: Path) -> int:
    total = 0
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            count = 1
            for length in file.get_slice(key).get_shape():
                count *= length
            total += count
    return total

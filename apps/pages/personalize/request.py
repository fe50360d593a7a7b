"""What the page Teach asks a job for: presets, the command's words, and what it should cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from veneer import base_models, methods
from veneer.base_models.loading import find
from veneer.injection import OptionError
from veneer.training import param_groups
from veneer.training.loop.config import PRESETS, preset_steps
from veneer.training.method_names import SHORTHANDS, split_methods
from veneer.training.personalization_config import PersonalizeConfig, teachable
from veneer.training.preflight.estimates import size
from veneer.training.preflight.step_cost import STATES

from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, bounded
from ..shared.config_form import Field, fields_of, words_of
from ..shared.time_estimates import REFERENCE, Pace, duration, pace_of
from ..shared.verdict import read_result

USUAL = "pivotal"
"""The method that is chosen at first: in a short time it comes closest."""
FIGURES = {"quick": "2", "balanced": "3", "thorough": "3"}
"""Name to images of each prompt that are evaluated; from 2 on, scores have intervals, without which no verdict is `learned`."""
PREVIEWS, CHECKPOINTS = 6, 4
"""In a run."""
IDLE = {"pivotal": Pace(0.09, 35.0, REFERENCE), "lora": Pace(0.09, 35.0, REFERENCE)}
"""Of the bundled base, before there is a run."""
MAIN = ("steps", "batch", "learning_rate", "resolution", "schedule", "seed")
MORE = (
    "where", "text_encoder", "class_images", "caption_dropout", "crop", "flip", "buckets", "optimizer", "weight_decay", "ema",
    "min_snr_gamma", "mixed_precision", "gradient_checkpointing", "preview_every", "checkpoint_every", "eval_seeds",
)  # fmt: skip
SETTINGS = fields_of(PersonalizeConfig, [*MAIN, *MORE])
LEAST = {"steps": 1, "batch": 1, "resolution": 8, "class_images": 0, "preview_every": 0, "checkpoint_every": 0, "eval_seeds": 0}
"""Of a setting; the command takes 0 steps and 0 images for the default."""
FROM_CONCEPT = ("by_site", "tokens", "initialize", "ids")
"""Options that a form leaves out: of single sites, and what follows from the concept."""


@dataclass(frozen=True)
class Asked:
    """What a visitor asks to be taught; all of it is checked when words are made of it."""

    concept: str
    class_word: str
    base: str
    method: str
    settings: Sequence[Any]
    options: Sequence[Any]


def method_names(all_of_them: bool) -> list[str]:
    """Methods to choose from, the usual one first, then those with usual settings for the bundled base.

    Args:
        all_of_them: also those that are only found by a look at what each can be put on, which takes a while the first time.
    """
    tuned = [name for name in base_models.preset("bundled").training if not methods.get(name).conditions]
    others = [name for name in teachable() if name not in tuned] if all_of_them else []
    return [*SHORTHANDS, *tuned, *others]


def main_method(method: str) -> str:
    """Of several that are joined, the one whose options are asked for.

    Raises:
        VeneerError: there is no such method.
    """
    return split_methods(bounded(method, "method"))[-1]


def options_of(method: str) -> list[Field]:
    """The fields of a method's form."""
    kind: Any = methods.get(main_method(method))
    skip = FROM_CONCEPT if param_groups.learns_words(kind) else FROM_CONCEPT[:1]
    return fields_of(kind, skip=skip)


def base_of(words: str) -> str:
    """A base that is there, or may be on the hub.

    Raises:
        VeneerError: neither.
    """
    base = bounded(words, "base") or "bundled"
    find(base)
    return base


def usual(preset: str, base: str, method: str) -> dict[str, str]:
    """Settings that a preset fills in, by name; the rest is left as usual."""
    named: dict[str, Any] = {"base": base_of(base), "method": bounded(method, "method")}
    config = PersonalizeConfig(photos=Path(), concept="x", out=Path(), **named).completed()
    steps = preset_steps(preset, config.steps or 500)
    return {
        "steps": str(steps),
        "batch": str(config.batch),
        "learning_rate": f"{config.main_rate():g}",
        "schedule": str(config.schedule),
        "seed": "0",
        "preview_every": str(max(1, steps // PREVIEWS)),
        "checkpoint_every": str(max(1, steps // CHECKPOINTS)),
        "eval_seeds": FIGURES.get(preset, "3"),
    }


def usual_options(base: str, method: str) -> Mapping[str, Any]:
    """Options of a method that are usual on a base."""
    found: Mapping[str, Any] = base_models.preset(base_of(base)).training.get(main_method(method), {}).get("options", {})
    return found


def words(asked: Asked, photos: Path) -> list[str]:
    """The command for what was asked.

    Raises:
        VeneerError: something that the command would not take, or too much of it.
    """
    concept, method = bounded(asked.concept, "concept"), bounded(asked.method, "method")
    if not concept:
        message = "the concept has no name: give it one that no other thing has, such as <toy>."
        raise OptionError(message, option="concept", given="")
    name = main_method(method)
    settings = words_of(PersonalizeConfig, SETTINGS, asked.settings)
    options = words_of(methods.get(name), options_of(method), asked.options, name)
    word = bounded(asked.class_word, "class word")
    given = {"concept": concept, "class-word": word, "base": base_of(asked.base), "method": method}
    _bounds(settings)
    flags = [f"--{key}={value}" for key, value in given.items() if value]
    return ["personalize", str(photos), *flags, *settings, *options, "--tracker=none"]


def _bounds(settings: Sequence[str]) -> None:
    """What no visitor may ask for more of, or less, by the words of the settings."""
    given = dict(word.removeprefix("--").split("=", 1) for word in settings if word.startswith("--") and "=" in word)
    most = {
        "resolution": LIMITS.side,
        "class_images": LIMITS.pictures * 16,
        "batch": LIMITS.photos,
        "eval_seeds": LIMITS.pictures,
    }
    for name, limit in most.items():
        value = given.get(name.replace("_", "-"), "0")
        if int(value) > limit:
            message = f"{name.replace('_', ' ')}: {value}; expected at most {limit}."
            raise OptionError(message, option=name, given=int(value), expected=limit)
    for name, least in LEAST.items():
        value = given.get(name.replace("_", "-"), str(least))
        if int(value) < least:
            message = f"{name.replace('_', ' ')}: {value}; expected at least {least}."
            raise OptionError(message, option=name, given=int(value), expected=least)
    if float(given.get("learning-rate", "1")) <= 0:
        rate = given["learning-rate"]
        raise OptionError(f"learning rate: {rate}; expected more than 0.", option="learning_rate", given=float(rate), expected=0)


def estimate(
    workspace: Workspace | None, base: str, method: str, steps: str, batch: str, optimizer: str = "adamw", eval_seeds: str = ""
) -> str:
    """Time and memory of a run in words: by the last one like it, else by a reference, and by the size of the base's files."""
    before = _alike(workspace, base_of(base), method) if workspace else None
    pace = _pace(before, base_of(base), method)
    return f"Estimate: {_time(pace, steps, batch, _share(eval_seeds))} {_memory(base_of(base), before, optimizer or 'adamw')}"


def lengths(base: str, method: str, workspace: Workspace | None = None) -> list[tuple[str, str]]:
    """Choices of the presets: steps and minutes, and the preset's name."""
    pace = _pace(_alike(workspace, base_of(base), method) if workspace else None, base_of(base), method)
    found = []
    for preset in PRESETS:
        given = usual(preset, base, method)
        images = int(given["steps"]) * int(given["batch"])
        minutes = f", {duration(pace.seconds(images, _share(given['eval_seeds'])))}" if pace else ""
        found.append((f"{preset}: {given['steps']} steps{minutes}", preset))
    return found


def _alike(workspace: Workspace, base: str, method: str) -> Job | None:
    """The newest finished job with this base and method, else with this base."""
    done = [job for job in workspace.all_jobs() if f"--base={base}" in job.about.get("words", []) and job.state == "done"]
    same = [job for job in done if f"--method={method}" in job.about["words"]]
    return next(iter([*same, *done]), None)


def _share(eval_seeds: Any) -> float:
    """Of the evaluation that the reference holds, by images of each prompt."""
    given = str(eval_seeds)
    return int(given) / int(FIGURES["balanced"]) if given.isdecimal() else 1.0


def _pace(before: Job | None, base: str, method: str) -> Pace | None:
    config = (read_result(before).get("config") or {}) if before else {}
    if before and (found := pace_of(before, int(config.get("batch") or 1), _share(config.get("eval_seeds")))):
        return found
    return IDLE.get(method, IDLE[USUAL]) if base == "bundled" else None


def _time(pace: Pace | None, steps: str, batch: str, share: float) -> str:
    if pace is None or not (steps.isdecimal() and batch.isdecimal()):
        return "the time is known after the first steps."
    return f"{duration(pace.seconds(int(steps) * int(batch), share))} in all, {pace.by}."


def _memory(base: str, before: Job | None, optimizer: str) -> str:
    values = parameters(base)
    if not values:
        return "Memory is known once the base model has been downloaded."
    trained = sum(int(m.get("parameters", 0)) for m in read_result(before).get("methods", [])) if before else 0
    more = trained * (8 + STATES.get(optimizer, 8))
    with_them = f" and {size(round(more))} for what is trained" if more else ", more for what is trained"
    base_has = f"{size(4 * values)} for the base model ({values / 1e6:,.1f} million parameters)"
    return f"Memory: about {base_has}{with_them}, plus activations."


def parameters(base: str) -> int:
    """Values in the files of a base that is a folder here; 0 for one on the hub."""
    folder = find(base)
    if not isinstance(folder, Path):
        return 0
    files = [path for path in folder.glob("*/*.safetensors") if ".fp16." not in path.name]
    return sum(map(_values, files))


def _values(path: Path) -> int:
    total = 0
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            count = 1
            for length in file.get_slice(key).get_shape():
                count *= length
            total += count
    return total

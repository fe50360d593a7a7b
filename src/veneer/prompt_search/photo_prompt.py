"""`veneer personalize --method pez`: a prompt for photos, without a file."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer import base_models
from veneer.atomic_files import write_atomically
from veneer.base_models.clip_features import BaseClip, load_clip
from veneer.base_models.devices import resolve_device
from veneer.injection.errors import OptionError
from veneer.methods.prompt.class_prompts.pez import PEZ
from veneer.training.data.image_io import read_photo
from veneer.training.data.photo_folder import find_photos
from veneer.training.evaluation.local_features import default_features
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.report.bars import show_bar
from veneer.training.report.run_folder import new_folder, run_folder

from .search import PromptMatch, SearchOptions, search_prompt

METHOD = "pez"
STEPS = 500
"""Default number of steps."""
OPTIONS = ("photos", "base", "method", "options", "features", "steps", "learning_rate", "weight_decay", "batch", "seed", "out")
"""Options of `veneer personalize` that the search has."""


def search_photo_prompt(config: PersonalizeConfig, show: Callable[[str], Any]) -> Path:
    """Writes a prompt that describes the photos to `prompt.txt` in the run folder.

    Of the options it has those of `pez` and `OPTIONS`; others are rejected.

    Args:
        show: called with the prompt, its similarity, and the command that generates images with it, in lines.
    Returns:
        The run folder.
    Raises:
        OptionError: no CLIP for `features`, an option that needs an adapter, or one out of range. DataError: unreadable photos.
    """
    method = PEZ(**config.options.get(METHOD, {}))
    _check(config, method)
    options = _options(config, method)
    photos = find_photos(config.photos or base_models.examples())
    out = run_folder(config.out or new_folder(Path("runs"), METHOD), False)
    clip = _open_clip(config)
    match = search_prompt(clip, [read_photo(photo.path) for photo in photos], options, _Bar(options.steps))
    write_atomically(out / "prompt.txt", f"{match.text}\n".encode())
    base = "" if config.base == "bundled" else f" --base {shlex.quote(config.base)}"
    show(f"prompt: {match.text}\nCLIP similarity to the photos: {match.similarity:.3f}")
    show(f"generate images: veneer generate {shlex.quote(match.text)}{base}")
    return out


def _check(config: PersonalizeConfig, method: PEZ) -> None:
    """Raises `OptionError` for an option without effect that differs from its default."""
    default = PersonalizeConfig()
    names = (field.name for field in dataclasses.fields(config) if field.name not in OPTIONS)
    option = next((name for name in names if getattr(config, name) != getattr(default, name)), None)
    if option is None and method.position != "end":
        option = "position"
    if option is not None:
        message = f"{option} has no effect with pez for photos, which searches a prompt and trains no adapter; leave it out"
        raise OptionError(message, option=option, method=METHOD, given=getattr(config, option, method.position))


def _options(config: PersonalizeConfig, method: PEZ) -> SearchOptions:
    rate = method.learning_rate if config.learning_rate is None else config.learning_rate
    steps, batch = (default if value is None else value for value, default in ((config.steps, STEPS), (config.batch, 1)))
    return SearchOptions(method.tokens, method.words, steps, rate, config.weight_decay, batch, config.seed)


def _open_clip(config: PersonalizeConfig) -> BaseClip:
    """The bundled CLIP, an open_clip folder, or `open_clip:NAME/TAG`, on the default device.

    Raises:
        OptionError: another feature model.
    """
    name = config.features or default_features(config.base)
    if name.startswith("open_clip:"):
        import open_clip

        architecture, _, tag = name.removeprefix("open_clip:").partition("/")
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=tag)
        clip = BaseClip(model.eval(), preprocess, open_clip.get_tokenizer(architecture))
    elif name == "bundled" or (Path(name) / "open_clip_config.json").is_file():
        clip = load_clip("bundled_clip" if name == "bundled" else name)
    else:
        message = f"features is {name!r}; pez needs 'bundled', an open_clip folder or open_clip:NAME/TAG"
        raise OptionError(message, option="features", method=METHOD, given=name, expected="open_clip")
    clip.model.to(resolve_device(None))
    return clip


class _Bar:
    """A bar of the steps, on a terminal."""

    def __init__(self, steps: int) -> None:
        self.steps, self.enabled = steps, sys.stderr.isatty()

    def __call__(self, step: int, best: PromptMatch | None) -> Any:
        if self.enabled:
            show_bar(sys.stderr, "searching", step, self.steps, "steps", f"similarity {best.similarity:.3f}" if best else "")

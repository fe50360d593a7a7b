"""`veneer personalize --method pez`: a prompt for photos, without a file."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

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
USED = frozenset(
    {"method", "options", "photos", "base", "features", "steps", "learning_rate", "weight_decay", "batch", "seed", "out"}
)
"""Options of `veneer personalize` that the search has."""


def search_photo_prompt(config: PersonalizeConfig, show: Callable[[str], Any]) -> Path:
    """Writes a prompt that describes the photos to `prompt.txt` in the run folder.

    Of the options it has those of `pez` and `USED`; others are rejected.

    Args:
        show: called with the prompt, its similarity, and the command that generates images with it, in lines.
    Returns:
        The run folder.
    Raises:
        OptionError: no CLIP for `features`, or an option without effect. UnknownOption: `pez` has no such option.
        DataError: unreadable photos.
    """
    _reject_ignored(config)
    method = cast(PEZ, PEZ.from_config(config.options.get(METHOD, {})))
    if method.position != "end":
        message = f"position is {method.position!r}, but a prompt for photos has no name of a class; leave it out."
        raise OptionError(message, option="position", method=METHOD, given=method.position, expected="end")
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


def _reject_ignored(config: PersonalizeConfig) -> None:
    """Raises `OptionError` for an option that the search does not have."""
    default = PersonalizeConfig()
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in USED}
    for name, given in options.items():
        if given != getattr(default, name):
            message = f"{name} has no effect with the method pez, which trains no adapter; leave it out."
            raise OptionError(message, option=name, method=METHOD, given=given, expected=getattr(default, name))
    others = tuple(name for name in config.options if name != METHOD)
    if others:
        message = f"options for {', '.join(others)}, but the method is pez; leave them out."
        raise OptionError(message, option="options", method=METHOD, given=others, expected=(METHOD,))


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

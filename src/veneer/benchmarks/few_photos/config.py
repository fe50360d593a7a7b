"""Configuration of the few-photo benchmark: subjects, class words, presets and prompts."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from veneer import base_models
from veneer.training.data.photo_folder import Photo, find_photos
from veneer.training.loop.config import PRESETS
from veneer.training.personalization_config import PersonalizeConfig

from ..shapes import BenchError
from .scores import asked

S = TypeVar("S", Tensor, list[Image.Image])

CLASS_WORDS: Mapping[str, str] = {
    "backpack": "backpack", "backpack_dog": "backpack", "bear_plushie": "toy", "berry_bowl": "bowl", "can": "can",
    "candle": "candle", "cat": "cat", "cat2": "cat", "clock": "clock", "colorful_sneaker": "shoe", "duck_toy": "toy",
    "fancy_boot": "shoe", "grey_sloth_plushie": "toy", "monster_toy": "toy", "pink_sunglasses": "glasses", "poop_emoji": "toy",
    "rc_car": "toy", "robot_toy": "toy", "shiny_sneaker": "shoe", "teapot": "teapot", "vase": "vase", "wolf_plushie": "toy",
    **dict.fromkeys(("dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"), "dog"),
}  # fmt: skip
"""Class words of the DreamBooth dataset's subjects, where possible words that the bundled base was trained on."""

BY_BENCHMARK = (
    "photos", "concept", "class_word", "base", "seed", "out", "resume", "dry_run", "prompts", "drift_prompts", "eval_seeds",
    "tracker", "features", "options",
)  # fmt: skip
"""Options of `veneer personalize` that the benchmark sets."""


@dataclass(frozen=True)
class TrainingPreset:
    """A named set of options of `veneer personalize`.

    Args:
        name: shown in tables, and part of the run's folder.
        length: `quick`, `balanced` or `thorough`: the share of the default steps, unless the options give `steps`.
        settings: fields of `PersonalizeConfig`. `options`: method name to its options.
    """

    name: str
    length: str = "balanced"
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """One subject: its photos and its class word."""

    name: str
    folder: Path
    word: str
    photos: tuple[Photo, ...]

    @property
    def concept(self) -> str:
        """The trained token."""
        return f"<{self.name.replace('_', '-')}>"


@dataclass(frozen=True)
class Prompts:
    """Prompts of the benchmark, `{concept}` in them, and images of each.

    Args:
        alone: the concept alone. `placed`: with a background color and a place. `unrelated`: without the concept.
        images: of each prompt.
    """

    alone: tuple[str, ...]
    placed: tuple[str, ...]
    unrelated: tuple[str, ...]
    images: int

    def seeds(self, seed: int) -> tuple[int, ...]:
        """Image seeds of a training seed: no two training seeds share one."""
        return tuple(range(seed * self.images, (seed + 1) * self.images))

    def split(self, images: S) -> tuple[S, S, S]:
        """Images of all prompts, or their features, prompt by prompt, as those alone, placed and unrelated."""
        a, b = len(self.alone) * self.images, (len(self.alone) + len(self.placed)) * self.images
        return images[:a], images[a:b], images[b:]

    def repeated(self, prompts: Sequence[str]) -> list[str]:
        """The prompt of each image."""
        return [prompt for prompt in prompts for _ in range(self.images)]


@dataclass(frozen=True)
class FewPhotosConfig:
    """Configuration of the few-photo benchmark and its defaults.

    Args:
        data: folders that hold one folder of photos per subject.
        subjects: names of the subjects to train.
        gallery: names of the subjects among which images are identified, the trained ones included (default: the trained ones).
        presets: quick, balanced or thorough, or NAME:KEY=VALUE,… with options of `veneer personalize`, such as
            long:steps=2000,lora.rank=32,crop=random; preset=quick takes that preset's steps, | separates several values.
        seeds: training seeds; each also generates other images.
        base: `bundled`, or a folder of the same layout.
        clip: CLIP that scores: `bundled`, or an open_clip folder.
        efficientnet: score by EfficientNet-Lite0 too.
        method: method of presets that name none.
        class_words: NAME=WORD for subjects without a known class word.
        prompts: prompts of the concept alone, with {concept} (default: the base's captions).
        placed_prompts: prompts that ask for a ground color and a place, with {concept} (default: the base's previews that do).
        images: images of each prompt.
        batch: images generated at once.
        out: folder for runs, results and image grids.

    Raises:
        BenchError: no subjects, a name twice, an unknown preset or option, or a count out of range.
    """

    data: tuple[Path, ...]
    subjects: tuple[str, ...] = ()
    gallery: tuple[str, ...] = ()
    presets: tuple[str, ...] = ("balanced",)
    seeds: tuple[int, ...] = (0, 1, 2)
    base: str = "bundled"
    clip: str = "bundled"
    efficientnet: bool = True
    method: str = "pivotal"
    class_words: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    placed_prompts: tuple[str, ...] = ()
    images: int = 5
    batch: int = 25
    out: Path = Path("runs/few-photos")

    def __post_init__(self) -> None:
        if not self.subjects:
            raise BenchError("few_photos: no subjects; give their names with --subjects.")
        for name in ("subjects", "gallery", "seeds"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise BenchError(f"few_photos: {name} are {', '.join(map(str, given))}; expected each once.")
        if missing := [name for name in self.subjects if self.gallery and name not in self.gallery]:
            raise BenchError(f"few_photos: --gallery has no {', '.join(missing)}; expected all --subjects in it.")
        if not self.seeds or min(self.seeds) < 0 or self.images < 1 or self.batch < 1:
            raise BenchError(
                f"few_photos: seeds {self.seeds}, images {self.images}, batch {self.batch}; expected seeds from 0, counts from 1."
            )
        names = [preset.name for preset in self.training_presets()]
        if not names or len(set(names)) < len(names):
            raise BenchError(f"few_photos: presets are {', '.join(names) or 'none'}; expected different names.")

    def training_presets(self) -> list[TrainingPreset]:
        """The presets, parsed."""
        return [parse_preset(text) for text in self.presets]

    def find_subjects(self, names: Sequence[str]) -> list[Subject]:
        """Subjects by name, from the folders of `data`.

        Raises:
            BenchError: no such subject, or one in two folders. DataError: unreadable photos.
        """
        return [self._subject(name) for name in names]

    def _subject(self, name: str) -> Subject:
        folders = [data / name for data in self.data if name and (data / name).is_dir()]
        if len(folders) != 1:
            known = sorted({p.name for data in self.data if data.is_dir() for p in data.iterdir() if p.is_dir()})
            raise BenchError(
                f"few_photos: {len(folders)} folders of subject {name!r}; expected one. Subjects: {', '.join(known) or 'none'}."
            )
        word = {**CLASS_WORDS, **self.class_words}.get(name) or base_models.preset(self.base).class_word
        return Subject(name, folders[0], word, tuple(find_photos(folders[0])))

    def prompt_set(self) -> Prompts:
        """The prompts, by default those of the base.

        Raises:
            BenchError: a prompt without {concept}, or one of `placed_prompts` without a background color.
        """
        preset = base_models.preset(self.base)
        placed = self.placed_prompts or tuple(prompt for prompt in preset.previews if asked(prompt)[0])
        found = Prompts(self.prompts or preset.templates, placed, preset.unrelated, self.images)
        for prompt in (*found.alone, *found.placed):
            if "{concept}" not in prompt:
                raise BenchError(f"few_photos: prompt {prompt!r}; expected {{concept}} in it.")
        if not placed or not all(asked(prompt)[0] for prompt in placed):
            raise BenchError(
                f"few_photos: placed prompts are {placed}; expected a background in each, such as 'white background'."
            )
        return found


def parse_preset(text: str) -> TrainingPreset:
    """A preset from its text, `NAME` or `NAME:KEY=VALUE,…`; see `FewPhotosConfig`.

    Raises:
        BenchError: an unknown name without options, or an unknown or reserved option.
    """
    name, _, rest = text.partition(":")
    if not re.fullmatch(r"[\w.+-]+", name) or not (rest or name in PRESETS):
        raise BenchError(f"few_photos: preset {text!r}; expected {', '.join(PRESETS)}, or NAME:KEY=VALUE,…")
    kinds = {f.name: hint for f, hint in _fields()}
    length = name if name in PRESETS else "balanced"
    settings, options = dict[str, Any](), dict[str, dict[str, Any]]()
    for entry in filter(None, rest.split(",")):
        key, sign, value = entry.partition("=")
        method, dot, option = key.partition(".")
        if not sign:
            raise BenchError(f"few_photos: preset {text!r} has {entry!r}; expected KEY=VALUE.")
        if key == "preset" and value in PRESETS:
            length = value
        elif dot and option:
            options.setdefault(method, {})[option] = _value(value)
        elif key in kinds and key not in BY_BENCHMARK:
            several = "tuple" in str(kinds[key])
            settings[key] = tuple(value.split("|")) if several else _value(value)
        else:
            raise BenchError(f"few_photos: preset {text!r} sets {entry!r}; expected an option of `veneer personalize`.")
    return TrainingPreset(name, length, settings, options)


def _fields() -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(PersonalizeConfig)
    return [(f, hints[f.name]) for f in dataclasses.fields(PersonalizeConfig)]


def _value(text: str) -> Any:
    """Parses a JSON number, true, false or null; `|` separates several values; other text is returned unchanged."""
    if "|" in text:
        return tuple(map(_value, text.split("|")))
    try:
        return json.loads(text)
    except ValueError:
        return text

"""Preview images with fixed seeds."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import nn

from veneer.base_models.presets import Preset
from veneer.base_models.schedulers import Scheduler, other_scheduler
from veneer.injection.attachment.attachment import Attachment
from veneer.injection.errors import OptionError, VeneerError

from ..encoder_offload import restore_encoders
from ..families import generated_images, is_single_prompt, sampling_arguments
from ..loop.seeds import generator
from .png_metadata import save_png


def check_counts(count: int, steps: int | None) -> None:
    """Checks the number of images and of denoising steps.

    Raises:
        OptionError: a value below 1.
    """
    for name, value in (("images_per_prompt", count), ("steps", steps)):
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise OptionError(f"{flag} is {value}; expected at least 1.", option=name, given=value, expected=1)


@dataclass(frozen=True)
class PreviewSettings:
    """Sampling settings of preview images.

    Args:
        seeds: one image per prompt and seed; its noise is a function of (seed, prompt) only.
        steps: denoising steps. `guidance`: classifier-free guidance scale (default: that of the pipeline).
        negative: negative prompt, for pipelines that support it.
        size: (height, width) in pixels (default: that of the pipeline).
        batch: batch size; affects speed and memory, and images only by rounding.
        scheduler: scheduler by name, or None for that of the pipeline.
    """

    seeds: tuple[int, ...] = (0,)
    steps: int = 25
    guidance: float | None = None
    negative: str = ""
    size: tuple[int, int] | None = None
    batch: int = 1
    scheduler: Scheduler | None = None

    def __post_init__(self) -> None:
        for name, given in (("seeds", len(self.seeds)), ("steps", self.steps), ("batch", self.batch)):
            if given < 1:
                raise OptionError(f"previews: {name}: {given}; expected at least 1", option=name, given=given, expected=1)


class SamplingOptions(Protocol):
    """Options of the commands that generate images; None takes the preset's value."""

    @property
    def seed(self) -> int: ...
    @property
    def images_per_prompt(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def guidance_scale(self) -> float | None: ...
    @property
    def negative_prompt(self) -> str | None: ...
    @property
    def size(self) -> tuple[int, int] | None: ...


def settings_of(options: SamplingOptions, preset: Preset) -> PreviewSettings:
    """Sampling settings from the options of a command and the preset of the base model."""
    return PreviewSettings(
        seeds=tuple(range(options.seed, options.seed + options.images_per_prompt)),
        steps=options.steps or preset.steps,
        guidance=preset.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        negative=preset.negative_prompt if options.negative_prompt is None else options.negative_prompt,
        size=options.size,
        batch=4,
    )


@dataclass(frozen=True)
class Preview:
    """An image with its prompt, seed and all settings as JSON values."""

    prompt: str
    seed: int
    image: Image.Image
    settings: dict[str, Any]


@dataclass(frozen=True)
class PreviewPair:
    """Images of one prompt and seed from the base and the adapted pipeline."""

    prompt: str
    seed: int
    base: Image.Image
    adapted: Image.Image


class _Job(NamedTuple):
    prompt: str
    seed: int
    noise: tuple[str, int]


def previews(
    pipe: Any,
    prompts: Sequence[str],
    settings: PreviewSettings = PreviewSettings(),
    words: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Preview]:
    """Generates images for every prompt and seed, prompt by prompt. The state of the pipeline is restored.

    The noise of an image is a function of its seed, its prompt and the number of earlier occurrences of that prompt.

    Args:
        pipe: any diffusers text-to-image pipeline, or one with class labels (DiT), whose prompts are label names or numbers.
        words: replacements in the prompts, as `base_words` of `generate_pairs`. The noise depends on the original prompt.
        progress: called after each batch with the number of images in it.
    Raises:
        VeneerError: a pipeline without prompts and class labels, or an unknown label.
    """
    return _generate(pipe, _jobs(prompts, settings, words or {}), settings, progress)


def generate_pairs(
    pipe: Any,
    attachments: Attachment | Sequence[Attachment],
    prompts: Sequence[str],
    settings: PreviewSettings = PreviewSettings(),
    base_words: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[PreviewPair]:
    """Generates images of every prompt and seed with the adapters disabled and enabled, from the same noise.

    Args:
        base_words: replacements in prompts for the base model, such as `{"<toy>": "toy"}` for a trigger token that only the
            adapters know. The noise depends on the original prompt.
        progress: called after each batch with the number of images in it.
    """
    several = [attachments] if isinstance(attachments, Attachment) else list(attachments)
    with ExitStack() as off:
        for attachment in several:
            off.enter_context(attachment.enabled(False))
        base = _generate(pipe, _jobs(prompts, settings, base_words or {}), settings, progress)
    adapted = previews(pipe, prompts, settings, progress=progress)
    return [PreviewPair(a.prompt, a.seed, b.image, a.image) for a, b in zip(adapted, base, strict=True)]


def _jobs(prompts: Sequence[str], settings: PreviewSettings, words: Mapping[str, str]) -> list[_Job]:
    return [
        _Job(replace_words(prompt, words) if words else prompt, seed, (prompt, list(prompts[:i]).count(prompt)))
        for i, prompt in enumerate(prompts)
        for seed in settings.seeds
    ]


def _generate(
    pipe: Any, jobs: Sequence[_Job], settings: PreviewSettings, progress: Callable[[int], None] | None = None
) -> list[Preview]:
    accepts = set(inspect.signature(pipe.__call__).parameters)
    found: list[Preview] = []
    rows = 1 if is_single_prompt(pipe) else settings.batch
    with sampling_mode(pipe), restore_encoders(pipe), torch.no_grad():  # not inference mode, in which optimum-quanto fails
        scheduler = other_scheduler(pipe.scheduler, settings.scheduler)
        for start in range(0, len(jobs), rows):
            part = jobs[start : start + rows]
            pipe.scheduler = copy.deepcopy(scheduler)
            images = generated_images(pipe(**_arguments(pipe, accepts, part, settings)))
            found += [Preview(j.prompt, j.seed, image, _record(pipe, j, settings)) for j, image in zip(part, images, strict=True)]
            if progress is not None:
                progress(len(part))
    return found


def replace_words(prompt: str, words: Mapping[str, str]) -> str:
    """`prompt` with every key of `words` replaced by its value, longest keys first, and single spaces."""
    for word in sorted(words, key=len, reverse=True):
        prompt = prompt.replace(word, words[word])
    return " ".join(prompt.split())


@contextmanager
def sampling_mode(pipe: Any) -> Iterator[None]:
    """Context with all modules in `eval` and without progress bar; restores modes, scheduler, bar and torch's random state."""
    modules = [m for c in pipe.components.values() if isinstance(c, nn.Module) for m in c.modules()]
    modes = [m.training for m in modules]
    scheduler, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            for module in modules:
                module.training = False
            pipe.set_progress_bar_config(disable=True)
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            pipe.scheduler = scheduler
            if bar is None:
                vars(pipe).pop("_progress_bar_config", None)
            else:
                pipe._progress_bar_config = bar


def _arguments(pipe: Any, accepts: set[str], part: Sequence[_Job], settings: PreviewSettings) -> dict[str, Any]:
    prompts = [job.prompt for job in part]
    wanted: dict[str, Any] = {
        "generator": [generator("preview", job.seed, *job.noise) for job in part],
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "clean_caption": False,
    }
    if settings.guidance is None:
        del wanted["guidance_scale"]
    if "prompt" in accepts:
        wanted["prompt"] = prompts
    elif "class_labels" in accepts:
        wanted["class_labels"] = [_label(pipe, prompt) for prompt in prompts]
    else:
        kind = type(pipe).__name__
        raise VeneerError(f"previews: {kind} supports neither prompts nor class labels.", given=kind)
    if settings.negative:
        wanted["negative_prompt"] = [settings.negative] * len(part)
    if settings.size:
        wanted["height"], wanted["width"] = settings.size
    return sampling_arguments(pipe, {name: value for name, value in wanted.items() if name in accepts}, len(prompts))


def _label(pipe: Any, prompt: str) -> int:
    if prompt.isdecimal():
        return int(prompt)
    labels: dict[str, int] = getattr(pipe, "labels", {})
    if prompt not in labels:
        message = f"previews: {prompt!r} is not a class label of this pipeline; expected one of {', '.join(list(labels)[:12])} …"
        raise OptionError(message, option="prompt", given=prompt, expected=tuple(labels))
    return labels[prompt]


def _record(pipe: Any, job: _Job, settings: PreviewSettings) -> dict[str, Any]:
    facts = {k: v for k, v in asdict(settings).items() if k not in ("seeds", "batch")}
    names = {"pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__}
    return {"prompt": job.prompt, "seed": job.seed, **facts, **names}


def save_preview(folder: Path, preview: Preview, more: Mapping[str, Any]) -> Path:
    """Writes the image to the first unused `NAME-SEED.png`."""
    words = "-".join("".join(c if c.isalnum() else " " for c in preview.prompt).split())[:60] or "picture"
    stem = folder / f"{words}-{preview.seed}"
    path, number = stem.with_suffix(".png"), 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}.png")
    return save_png(preview.image, path, {**preview.settings, **more})

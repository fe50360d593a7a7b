"""Pictures from a base with trained adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer import base_models
from veneer.base_models.devices import resolve_device
from veneer.formats import load_all, read
from veneer.formats.native import KEY
from veneer.injection import Attachment, OptionError
from veneer.training import param_groups
from veneer.training.families import Family, family
from veneer.training.report.image_grid import Row, sheet
from veneer.training.report.previews import PreviewSettings, check_counts, pairs, previews, save_png, save_preview


@dataclass(frozen=True)
class GenerateConfig:
    """Configuration of `veneer generate` and its defaults.

    Args:
        prompt: one or more prompts; for DiT class labels.
        adapter: files or folders, each with an optional strength: `runs/toy-lora` or `runs/toy-lora:0.8`.
        base: base model: `bundled`, a folder or a hub name (default: the base model that the first adapter was trained on).
        negative_prompt: negative prompt (default: the base model's).
        images_per_prompt: images to generate per prompt; their seeds count up from `seed`.
        seed: seed of the first image.
        steps: denoising steps (default: the base model's).
        guidance_scale: scale of classifier-free guidance (default: the base model's).
        size: height and width in pixels (default: the base model's).
        side_by_side: also write an image grid with the base model's image beside each, from the same noise.
        device: device such as `cuda` (default: a GPU if there is one).
        out: folder for the images.
    """

    prompt: tuple[str, ...]
    adapter: tuple[str, ...] = ()
    base: str | None = None
    negative_prompt: str | None = None
    images_per_prompt: int = 1
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    side_by_side: bool = False
    device: str | None = None
    out: Path = Path("images")

    def __post_init__(self) -> None:
        check_counts(self.images_per_prompt, self.steps)


def generate(config: GenerateConfig) -> list[Path]:
    """Draw, and write one PNG a picture with its settings in the metadata; with `without` also `sheet.png`.

    Returns:
        The files written.
    Raises:
        VeneerError: an adapter that is not there or does not fit the base, or a prompt that is no class label.
    """
    adapters, device = [parse_adapter(text) for text in config.adapter], resolve_device(config.device)
    base = config.base or next((found for path, _ in adapters if (found := base_of(path))), "bundled")
    preset = base_models.preset(base)
    pipe = base_models.load(base).to(device)
    param_groups.freeze(pipe)
    attached = [a for path, scale in adapters for a in load_all(pipe, path, scale=scale)]
    prompts = [_whole(family(pipe), prompt) for prompt in config.prompt]

    settings = PreviewSettings(
        seeds=tuple(range(config.seed, config.seed + config.images_per_prompt)),
        steps=config.steps or preset.steps,
        guidance=preset.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        negative=preset.negative_prompt if config.negative_prompt is None else config.negative_prompt,
        size=config.size,
        batch=4,
    )
    made = previews(pipe, prompts, settings)
    used = [{"file": str(path), "scale": scale} for path, scale in adapters]
    config.out.mkdir(parents=True, exist_ok=True)
    files = [save_preview(config.out, preview, {"base": base, "adapters": used}) for preview in made]
    if config.side_by_side:
        files.append(_beside(replace(config, prompt=tuple(prompts)), pipe, attached, settings))
    return files


def parse_adapter(text: str) -> tuple[Path, float]:
    """`PATH` or `PATH:strength`.

    Raises:
        VeneerError: nothing is there.
    """
    path, _, number = text.rpartition(":")
    try:
        scale, place = (float(number), Path(path)) if path and not Path(text).exists() else (1.0, Path(text))
    except ValueError:
        scale, place = 1.0, Path(text)
    if not place.exists():
        message = f"adapter {text!r}: no such file or folder. Expected PATH or PATH:strength, such as runs/toy-lora:0.8."
        raise OptionError(message, option="adapter", given=text, file=place)
    return place, scale


def base_of(path: Path) -> str | None:
    """The base that a native file says it was trained on."""
    found = _header(path).get("provenance", {}).get("base")
    return base_models.current_name(found) if isinstance(found, str) else None


def draws(path: Path) -> bool:
    """Whether a file is for a model that draws, as far as it says: a classifier's native file is for a model of no parts."""
    return "" not in _header(path).get("base", {})


def concept_of(path: Path) -> str | None:
    """The trigger token or word that a native file was trained on, as far as it says."""
    found = _header(path).get("provenance", {}).get("concept")
    return found if isinstance(found, str) and found else None


def taught_words(path: Path) -> dict[str, str]:
    """What the base may be told in the place of a word that a native file was taught, such as `{"<toy>": "toy"}`."""
    told = _header(path).get("provenance", {})
    concept, usual = told.get("concept"), told.get("class_word")
    return {concept: usual} if isinstance(concept, str) and concept and isinstance(usual, str) and usual else {}


def _header(path: Path) -> dict[str, Any]:
    """What a native file says of itself; nothing for other formats."""
    file = read(path)
    return file.json(KEY) if KEY in file.metadata else {}


def _whole(kind: Family, prompt: str) -> str:
    """As much of a prompt as the text encoders take; what is left out is printed."""
    kept = kind.shorten(prompt)
    if kept != prompt:
        print(f"note: the prompt is longer than the text encoder takes; left out: {prompt[len(kept) :].strip()!r}", flush=True)
    return kept


def _beside(config: GenerateConfig, pipe: Any, attached: list[Attachment], settings: PreviewSettings) -> Path:
    words = {word: usual for text in config.adapter for word, usual in taught_words(parse_adapter(text)[0]).items()}
    found = pairs(pipe, attached, config.prompt, settings, words)
    rows = [Row(f"{pair.prompt}, seed {pair.seed}", ((pair.base,), (pair.adapted,))) for pair in found]
    picture = sheet(rows, columns=("side_by_side", "with"))
    facts = {"prompts": list(config.prompt), "adapters": list(config.adapter), "seed": config.seed}
    return save_png(picture, config.out / "sheet.png", facts)

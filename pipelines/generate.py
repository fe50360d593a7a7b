"""Generate images with a base model and trained adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer import base_models
from veneer.base_models.devices import Dtype, resolve_device
from veneer.base_models.loading import load_on_device
from veneer.base_models.offloading import Offload, check_offload, offload_pipeline
from veneer.formats import load_all
from veneer.injection import Attachment, OptionError
from veneer.training import prepare_base
from veneer.training.families import Family, family
from veneer.training.report.image_grid import GridRow, make_grid
from veneer.training.report.png_metadata import save_png
from veneer.training.report.previews import PreviewSettings, check_counts, generate_pairs, previews, save_preview, settings_of

from .convert import base_of, native_header


@dataclass(frozen=True)
class GenerateConfig:
    """Configuration of `veneer generate` and its defaults.

    Args:
        prompt: one or more prompts; for DiT class labels.
        adapter: files or folders, each with an optional strength: `runs/toy-lora` or `runs/toy-lora:0.8`.
        base: base model: `bundled`, a folder, a file or a hub name (default: the base model of the first adapter).
        negative_prompt: negative prompt (default: the base model's).
        images_per_prompt: images to generate per prompt; their seeds count up from `seed`.
        seed: seed of the first image.
        steps: denoising steps (default: the base model's).
        guidance_scale: scale of classifier-free guidance (default: the base model's).
        size: height and width in pixels (default: the base model's).
        side_by_side: also write an image grid with the base model's image beside each, from the same noise.
        dtype: dtype of the frozen base model; adapters are in float32 (default: bfloat16 on a GPU, float32 on a CPU).
        quantize: quantization of frozen linear layers, as in training: `nf4` or another kind, or COMPONENT=KIND (default: none).
        offload: move weights to host memory while they are not used: `none`, `model` (one component at a time is on the GPU) or
            `group` (one block at a time: slower, and least memory).
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
    dtype: Dtype | None = None
    quantize: tuple[str, ...] = ()
    offload: Offload = "none"
    device: str | None = None
    out: Path = Path("images")

    def __post_init__(self) -> None:
        check_counts(self.images_per_prompt, self.steps)
        base_models.parse_quantize(self.quantize)


def generate(config: GenerateConfig) -> list[Path]:
    """Generates images and writes one PNG per image with its settings in the metadata; with `side_by_side` also `sheet.png`.

    Returns:
        The files written.
    Raises:
        VeneerError: a missing adapter, one that is incompatible with the base model, or an unknown class label.
    """
    adapters, device = [parse_adapter(text) for text in config.adapter], resolve_device(config.device)
    base = config.base or next((found for path, _ in adapters if (found := base_of(path))), "bundled")
    check_offload(config.offload, device, quantized=bool(config.quantize))
    pipe = load_on_device(base, device, config.dtype, config.quantize, on_cpu=config.offload != "none")
    prepare_base.freeze(pipe)
    attached = [a for path, scale in adapters for a in load_all(pipe, path, scale=scale)]
    offload_pipeline(pipe, config.offload, device)
    prompts = [_truncated(family(pipe), prompt) for prompt in config.prompt]

    settings = settings_of(config, base_models.preset(base))
    made = previews(pipe, prompts, settings)
    used = [{"file": str(path), "scale": scale} for path, scale in adapters]
    config.out.mkdir(parents=True, exist_ok=True)
    files = [save_preview(config.out, preview, {"base": base, "adapters": used}) for preview in made]
    if config.side_by_side:
        files.append(_write_comparison(replace(config, prompt=tuple(prompts)), pipe, attached, settings))
    return files


def parse_adapter(text: str) -> tuple[Path, float]:
    """Path and strength from `PATH` or `PATH:strength`.

    Raises:
        VeneerError: the path does not exist.
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


def is_diffusion_adapter(path: Path) -> bool:
    """Whether a file is for a diffusion pipeline, judged by its metadata: a classifier's native file names no components."""
    return "" not in native_header(path).get("base", {})


def concept_of(path: Path) -> str | None:
    """The trigger token or word in the metadata of a native file, or None."""
    found = native_header(path).get("provenance", {}).get("concept")
    return found if isinstance(found, str) and found else None


def words_for_base(path: Path) -> dict[str, str]:
    """Replacement of a native file's trained token in prompts for the base model, such as `{"<toy>": "toy"}`."""
    provenance = native_header(path).get("provenance", {})
    concept, word = provenance.get("concept"), provenance.get("class_word")
    return {concept: word} if isinstance(concept, str) and concept and isinstance(word, str) and word else {}


def _truncated(kind: Family, prompt: str) -> str:
    """The prompt, truncated at the token limit of the text encoders; prints what is cut off."""
    short = kind.shorten(prompt)
    if short != prompt:
        print(f"note: the prompt exceeds the text encoder's token limit; cut off: {prompt[len(short) :].strip()!r}", flush=True)
    return short


def _write_comparison(config: GenerateConfig, pipe: Any, attached: list[Attachment], settings: PreviewSettings) -> Path:
    words = {word: usual for text in config.adapter for word, usual in words_for_base(parse_adapter(text)[0]).items()}
    found = generate_pairs(pipe, attached, config.prompt, settings, words)
    rows = [GridRow(f"{pair.prompt}, seed {pair.seed}", ((pair.base,), (pair.adapted,))) for pair in found]
    image = make_grid(rows, columns=("without", "with"))
    facts = {"prompts": list(config.prompt), "adapters": list(config.adapter), "seed": config.seed}
    return save_png(image, config.out / "sheet.png", facts)

"""Generate images with a base model and trained adapters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer import base_models
from veneer.base_models.devices import Dtype, resolve_device
from veneer.base_models.loading import load_on_device
from veneer.base_models.offloading import Offload, check_offload, offload_pipeline
from veneer.base_models.schedulers import Scheduler, other_scheduler
from veneer.formats import load_all
from veneer.injection import Attachment
from veneer.training import prepare_base
from veneer.training.attach_methods import skip_lower_layers
from veneer.training.families import Family, family
from veneer.training.fixed_adapters import missing_adapters, parse_adapter, split_strength
from veneer.training.report.image_grid import GridRow, make_grid
from veneer.training.report.phases import PhaseReport
from veneer.training.report.png_metadata import save_png
from veneer.training.report.previews import PreviewSettings, check_counts, generate_pairs, previews, save_preview, settings_of

from .convert import base_of, native_header


@dataclass(frozen=True)
class GenerateConfig:
    """Configuration of `veneer generate` and its defaults.

    Args:
        prompt: one or more prompts, with the trigger token of the adapter; class labels if the base model is a DiT.
        adapter: adapter files, run folders or hub names, each with an optional strength: `runs/toy-lora` or `user/toy-lora:0.8`
            (default: none, the base model alone).
        base: base model: `bundled`, a diffusers folder, a .safetensors file or a hub name (default: that of the first adapter).
        negative_prompt: what the images should not show (default: the preset's, else empty).
        skip_layers: with an adapter of `adapter_drop`: number of layers, from the first, whose adapters are left out, for faster
            inference (default: as saved).
        images_per_prompt: images to generate per prompt; their seeds count up from `seed`.
        seed: seed of the first image.
        steps: denoising steps (default: the base model's).
        guidance_scale: scale of classifier-free guidance (default: the base model's).
        size: `WIDTHxHEIGHT` in pixels, or one side of a square; in Python (height, width) (default: the base model's).
        scheduler: scheduler (sampler), with the base model's noise schedule (default: the base model's).
        side_by_side: also write an image grid, with the image of the base model from the same noise beside each.
        dtype: dtype of the frozen base model; adapters are in float32 (default: bfloat16 on a GPU, float32 on a CPU).
        quantize: quantization of frozen linear layers, as in `veneer personalize`: a kind such as `nf4`, or COMPONENT=KIND
            (default: none).
        offload: move weights to host memory while they are not used: `model` has one component at a time on the GPU, `group`
            one block at a time (least memory, slower).
        device: device such as `cuda` (default: a GPU if there is one).
        out: folder for the images, whose names are prompt and seed; no image is overwritten.
    """

    prompt: tuple[str, ...]
    adapter: tuple[str, ...] = ()
    base: str | None = None
    negative_prompt: str | None = None
    skip_layers: int = 0
    images_per_prompt: int = 1
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    scheduler: Scheduler | None = None
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
    note_missing_adapters([path for path, _ in adapters])
    check_offload(config.offload, device, quantized=bool(config.quantize))
    report = PhaseReport(None, sys.stderr)
    report("loading")
    pipe = load_on_device(base, device, config.dtype, config.quantize, on_cpu=config.offload != "none")
    pipe.scheduler = other_scheduler(pipe.scheduler, config.scheduler)
    prepare_base.freeze(pipe)
    attached = [a for path, scale in adapters for a in load_all(pipe, path, scale=scale)]
    skip_lower_layers(attached, config.skip_layers)
    offload_pipeline(pipe, config.offload, device)
    prompts = [_truncated(family(pipe), prompt) for prompt in config.prompt]

    settings = settings_of(config, base_models.preset(base))
    made = previews(pipe, prompts, settings, progress=report("generating", len(prompts) * len(settings.seeds)))
    used = [{"file": name, "scale": scale} for name, scale in map(split_strength, config.adapter)]
    config.out.mkdir(parents=True, exist_ok=True)
    files = [save_preview(config.out, preview, {"base": base, "adapters": used}) for preview in made]
    if config.side_by_side:
        paths = [path for path, _ in adapters]
        files.append(_write_comparison(replace(config, prompt=tuple(prompts)), pipe, attached, settings, paths, report))
    return files


def note_missing_adapters(paths: Sequence[Path]) -> None:
    """Prints which adapters are needed besides these: those that they were trained on top of."""
    for path in paths:
        for missing in missing_adapters(native_header(path).get("provenance", {}), paths):
            print(f"note: {path} was trained on top of {missing}; use it as well: --adapter {missing} {path}", flush=True)


def is_diffusion_adapter(path: Path) -> bool:
    """Whether a file is for a diffusion pipeline, judged by its metadata: a classifier's native file names no components."""
    return "" not in native_header(path).get("base", {})


def concepts_in_file(path: Path) -> dict[str, str]:
    """Every trigger token or word in the metadata of a native file, with its class word or ""."""
    provenance = native_header(path).get("provenance", {})
    one = {provenance["concept"]: provenance.get("class_word")} if isinstance(provenance.get("concept"), str) else {}
    several = provenance.get("concepts") if isinstance(provenance.get("concepts"), dict) else {}
    return {token: word if isinstance(word, str) else "" for token, word in {**one, **several}.items() if token}


def words_for_base(path: Path) -> dict[str, str]:
    """Replacements of a native file's trained tokens in prompts for the base model, such as `{"<toy>": "toy"}`."""
    return {token: word for token, word in concepts_in_file(path).items() if word}


def _truncated(kind: Family, prompt: str) -> str:
    """The prompt, truncated at the token limit of the text encoders; prints what is cut off."""
    short = kind.shorten(prompt)
    if short != prompt:
        print(f"note: the prompt exceeds the text encoder's token limit; cut off: {prompt[len(short) :].strip()!r}", flush=True)
    return short


def _write_comparison(
    config: GenerateConfig,
    pipe: Any,
    attached: list[Attachment],
    settings: PreviewSettings,
    paths: list[Path],
    report: PhaseReport,
) -> Path:
    words = {token: word for path in paths for token, word in words_for_base(path).items()}
    count = report("comparing", 2 * len(config.prompt) * len(settings.seeds))
    found = generate_pairs(pipe, attached, config.prompt, settings, words, count)
    rows = [GridRow(f"{pair.prompt}, seed {pair.seed}", ((pair.base,), (pair.adapted,))) for pair in found]
    image = make_grid(rows, columns=("without", "with"))
    facts = {"prompts": list(config.prompt), "adapters": list(config.adapter), "seed": config.seed}
    return save_png(image, config.out / "sheet.png", facts)

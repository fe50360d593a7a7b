"""Base models in a single safetensors file, as the Stable Diffusion community shares them, loaded without a network.

diffusers' `from_single_file` converts the tensors. What a file lacks, configs and tokenizers, comes from this package.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from veneer.injection.errors import BaseModelError

from .architectures import ARCHITECTURES, CLIP, CLIP_PROJECTED, VAE, Config
from .clip_vocabulary import clip_tokenizer
from .folders import read_json

Shapes = Mapping[str, tuple[int, ...]]
QUANTIZED = (".absmax", ".quant_map", ".weight_scale", ".scale_weight", ".SCB", "._scale", ".qweight")
"""Endings of tensors that quantized checkpoints have beside their weights."""
UNET = "model.diffusion_model."
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CROSS = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
NOISE: Config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
ZERO_SNR: Config = {
    **NOISE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
PIPELINES: dict[str, tuple[str, Config, tuple[str, Config]]] = {
    "sd15": (
        "StableDiffusionPipeline", {**VAE, "sample_size": 512, "scaling_factor": 0.18215},
        ("PNDMScheduler", {**NOISE, "skip_prk_steps": True, "set_alpha_to_one": False}),
    ),
    "sdxl": (
        "StableDiffusionXLPipeline", {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        ("EulerDiscreteScheduler", {**NOISE, "timestep_spacing": "leading"}),
    ),
}  # fmt: skip
"""Architecture to the pipeline's class, the VAE's config, and the scheduler's class and config."""


def load_single_file(file: Path, config: str | Path | None = None, **settings: Any) -> Any:
    """Loads a Stable Diffusion 1.x or XL checkpoint, with v-prediction and zero terminal SNR if it says so (`v_pred`, `ztsnr`).

    Args:
        config: a diffusers folder with the configs and tokenizers of the model (default: those of the published model).
        settings: arguments of `from_single_file`, such as `dtype`.
    Raises:
        BaseModelError: not a safetensors file, another model, or it lacks a component.
    """
    import diffusers

    shapes = _read_shapes(file)
    _reject_quantized(file, shapes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config) if config is not None else _write_configs(Path(temporary), _identify(file, shapes), shapes)
        kind = getattr(diffusers, read_json(folder / "model_index.json")["_class_name"])
        try:
            pipe = kind.from_single_file(str(file), config=str(folder), local_files_only=True, **settings)
        except Exception as error:  # diffusers raises several kinds for missing and misshapen tensors
            kinds = kind.__name__
            message = f"load: {file} could not be loaded as {kinds}: {type(error).__name__}: {str(error).strip()[:300]}"
            raise BaseModelError(message, file=file, where="tensors", given=type(error).__name__, expected=kinds) from error
    _check_complete(file, pipe, shapes)
    return pipe


def _reject_quantized(file: Path, shapes: Shapes) -> None:
    """Raises `BaseModelError` for a file with packed weights and their scales."""
    scales = [key for key in shapes if key.endswith(QUANTIZED)]
    if scales:
        message = (
            f"load: {file} is a quantized checkpoint (it has {scales[0]}); expected float weights. Load the float checkpoint, "
            "with quantize=... (--quantize) to save memory."
        )
        raise BaseModelError(message, file=file, where=scales[0], given="quantized", expected="float weights")


def _check_complete(file: Path, pipe: Any, shapes: Shapes) -> None:
    """Raises `BaseModelError` if a tensor of the pipeline is not in the file, or the file has more of the UNet."""
    for part, module in pipe.components.items():
        parameters = module.named_parameters() if hasattr(module, "named_parameters") else ()
        missing = [f"{part}.{name}" for name, parameter in parameters if parameter.is_meta]
        if missing:
            message = f"load: {file} lacks {len(missing)} tensors: {', '.join(missing[:4])}. It is incomplete; copy it again."
            raise BaseModelError(message, file=file, where="tensors", given=tuple(missing), expected=type(pipe).__name__)
    given = sum(name.startswith(UNET) for name in shapes)
    expected = len(pipe.unet.state_dict()) if given and getattr(pipe, "unet", None) is not None else given
    if given != expected:
        message = f"load: {file} has {given} tensors of a UNet, {type(pipe).__name__} has {expected}: it is another model."
        raise BaseModelError(message, file=file, where="unet", given=given, expected=expected)


def check_suffix(file: Path) -> None:
    """Raises `BaseModelError` unless the name ends in `.safetensors`."""
    if file.suffix == ".gguf":
        message = f"load: {file} has a denoiser only; expected a pipeline, and the file as quantize=... (--quantize)."
        raise BaseModelError(message, file=file, where="kind", given=file.suffix, expected="quantize")
    if file.suffix != ".safetensors":
        message = f"load: {file} may be a pickle, which can run code when loaded; expected a .safetensors file or a folder."
        raise BaseModelError(message, file=file, where="kind", given=file.suffix, expected=".safetensors")


def _read_shapes(file: Path) -> Shapes:
    """The shapes of a file's tensors, from its header.

    Raises:
        BaseModelError: not a safetensors file.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        message = f"load: {file} is not a complete safetensors file ({error}); copy it again."
        raise BaseModelError(message, file=file, where="kind", given="unreadable", expected=".safetensors") from error


def _identify(file: Path, shapes: Shapes) -> str:
    """The architecture of a checkpoint, by the width of the text embeddings that its UNet reads.

    Raises:
        BaseModelError: another model, or no UNet.
    """
    widths = {shapes[key][1] for block in range(1, 9) if (key := CROSS.format(block)) in shapes}
    name = {frozenset({768}): "sd15", frozenset({2048}): "sdxl"}.get(frozenset(widths))
    if name is None or len(shapes.get(FIRST, ())) != 4:
        raise BaseModelError(
            f"load: {file} is not a checkpoint of Stable Diffusion 1.x or XL. Adapters are given with --adapter; of another "
            "model, pass a diffusers folder with its configs as config=..., or convert it with diffusers.",
            file=file,
            where="kind",
            given=tuple(list(shapes)[:3]),
            expected=tuple(PIPELINES),
        )
    return name


def _write_configs(folder: Path, name: str, shapes: Shapes) -> Path:
    """Writes what `save_pretrained` writes beside the weights."""
    import diffusers
    import torch
    import transformers

    (pipeline, vae, _), (scheduler, noise) = PIPELINES[name], _scheduler(name, shapes)
    index: dict[str, Any] = {"_class_name": pipeline}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", scheduler]}
    getattr(diffusers, scheduler)(**noise).save_pretrained(folder / "scheduler")
    with torch.device("meta"):
        autoencoder: Any = diffusers.AutoencoderKL(**vae)
        autoencoder.save_config(folder / "vae")
        for part, (kind, config) in ARCHITECTURES[name].items():
            if kind in (CLIP, CLIP_PROJECTED):
                tokenizer = part.replace("text_encoder", "tokenizer")
                transformers.CLIPTextConfig(**config, architectures=[kind]).save_pretrained(folder / part)
                _tokenizer("!" if part == "text_encoder_2" else "<|endoftext|>").save_pretrained(folder / tokenizer)
                index |= {part: ["transformers", kind], tokenizer: ["transformers", "CLIPTokenizer"]}
            else:
                getattr(diffusers, kind)(**{**config, "in_channels": shapes[FIRST][1]}).save_config(folder / part)
                index[part] = ["diffusers", kind]
    if name == "sd15":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _scheduler(name: str, keys: Collection[str]) -> tuple[str, dict[str, Any]]:
    """The scheduler's class and config. By convention, a file has tensors named `v_pred` and `ztsnr` if its model predicts v.

    Source: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, WACV 2024: trailing timesteps at zero SNR.
    """
    kind, config = PIPELINES[name][2]
    prediction = {"prediction_type": "v_prediction"} if "v_pred" in keys else {}
    if "ztsnr" in keys:
        kind, config = "DDIMScheduler", ZERO_SNR
    return kind, {**config, **prediction}


def _tokenizer(pad: str) -> Any:
    tokenizer = clip_tokenizer()
    if tokenizer is None:
        message = "load: CLIP's vocabulary is in the package open_clip, which is not installed; install veneer[open-clip]."
        raise BaseModelError(message, where="tokenizer", given="missing", expected="open_clip")
    tokenizer.pad_token = pad
    return tokenizer

"""Configuration of `veneer control train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer import base_models
from veneer.base_models.devices import Dtype, Precision
from veneer.injection import methods
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.training.attach_methods import check_options
from veneer.training.data.buckets import Crop
from veneer.training.loop.config import TrainConfig, check_dtypes, check_sharding, loop_config, run_identity
from veneer.training.objective.objectives import ObjectiveOptions
from veneer.training.objective.timestep_sampling import Density
from veneer.training.report.feature_models import check_features
from veneer.training.report.run_folder import new_folder
from veneer.training.training_options import NOT_COMPARED, DiffusionTrainingOptions

from .maps import maps

WITHOUT_EFFECT = (
    *NOT_COMPARED, "data", "base", "steps", "learning_rate", "cache", "cache_folder", "resume", "eval_seeds", "features",
    "dry_run", "out", "generated_images", "grid_images", "dtype", "save_dtype", "shard_base",
)  # fmt: skip
"""Options that a resumed run may change, or that are compared by content."""


@dataclass(frozen=True)
class ControlConfig(DiffusionTrainingOptions):
    """Configuration of `veneer control train` and its defaults.

    Args:
        data: folder of photos with captions, as for `veneer personalize` (default: images that the base model generates).
        condition: what the model is conditioned on: a map that is computed from each photo (`canny`, `soft_edge`, `scribble`,
            `grey`, `blur`, `low_resolution`, `palette` or `mask`), `pairs` for map files (`NAME.map.png` beside `NAME.png`, or
            folders `images` and `conditions`), or `image` for the photos themselves (default: canny, but image for ip_adapter).
        method: `controlnet`, `t2i_adapter` (small and fast), `controlnext` (also trains base weights) or `ip_adapter` (image
            prompts); `--method NAME --help` shows its options.
        base: base model: `bundled`, a diffusers folder, a .safetensors file or a hub name, of SD 1.x, SD 2 or SDXL.
        options: method name to its options.
        train: sites whose base weights train as well (default: `attn.out xattn.out` for controlnext, else none).
        generated_images: number of training images that the base model generates, without `data`.
        validation: share of the images to hold out, on which the metrics are measured, 0 to 1.
        template: caption of photos without a caption (default: an empty one).
        caption_dropout: probability of an empty caption in a step, 0 to 1 (default: the preset's, else 0.5; 0.1 for
            ip_adapter).
        image_dropout: probability of an empty image in a step of ip_adapter, 0 to 1; classifier-free guidance needs some.
        resolution: side of the images in pixels (default: the base model's).
        crop: part of the photo that a crop keeps; `random` samples it in each step.
        flip: probability of a horizontal flip, 0 to 1; leave it at 0 for faces and text.
        buckets: aspect-ratio buckets: train at the photos' aspect ratios; otherwise on square crops.
        steps: optimizer steps (default: the preset's, 800 or 1,500 with the bundled model, else 20,000). Each has `batch` ×
            `gradient_accumulation_steps` images.
        batch: images per micro-batch, in total over all processes (default: the preset's, else 4).
        gradient_accumulation_steps: micro-batches per optimizer step.
        learning_rate: peak learning rate (default: the preset's, else the method's, such as 0.00001 for controlnet).
        schedule: learning-rate schedule: `constant`, `cosine`, `cosine_with_restarts`, `linear`, `polynomial` or `rex`
            (default: the preset's, else constant).
        warmup: optimizer steps of linear warmup before the schedule.
        weight_decay: decoupled weight decay of all trained parameters.
        ema: decay of an exponential moving average of the trained weights, such as 0.999; the average is saved; 0 disables it.
        timestep_sampling: distribution of the noise level in training: `uniform`, `logit_normal`, `mode`, `cubic`, `sigmoid`,
            and for flow matching `shift` or `flux_shift` (default: cubic for t2i_adapter, else uniform). `logit_normal` has
            mean 0; diffusers' scripts count from the noisy end, so that their `--logit_mean` has the other sign.
        dtype: dtype of the frozen base model; adapters train in float32 (default: bfloat16 on a GPU, float32 on a CPU). float16
            needs `--mixed-precision fp16`.
        quantize: quantization of the denoiser's frozen linear layers: `nf4`, `nf4-dq`, `fp4`, `fp4-dq`, `int4`, `int8`,
            `int8-torchao`, `int8-quanto`, `fp8`, or a GGUF file; with COMPONENT=KIND of other components, such as
            `text_encoder_2=int8` (default: none).
        shard_base: split the frozen weights over the processes of `accelerate launch` (FSDP2); not with `quantize`.
        mixed_precision: autocast of the forward pass to this dtype; `no` disables it.
        gradient_checkpointing: recompute activations in the backward pass: less memory, slower steps.
        cache: cache latents and text embeddings; random crops are computed in each step anyway.
        cache_folder: folder for the cache, which later runs reuse (default: in memory).
        save_dtype: dtype of the trained parameters in the files; training stays in float32.
        seed: seed of all random numbers.
        checkpoint_every: optimizer steps between checkpoints for `resume`, of which two are kept; 0 saves one only when the run
            is stopped, as by Ctrl+C.
        resume: continue from the newest checkpoint in `out`.
        preview_every: optimizer steps between previews, with metrics on a few validation images; 0 disables them (default: a
            quarter of the steps).
        strength: strength of the control in metrics and previews.
        eval_seeds: images to generate per validation image for the metrics; 0 disables them.
        grid_images: validation images in the image grid.
        features: image model of the metrics with `--condition image`: `bundled`, a folder, or a name such as
            `timm:vit_small_patch16_224.dino`.
        tracker: logger of loss and metrics: `tensorboard` (in `logs` of the run folder), `wandb`, `comet_ml`, `mlflow` or
            others of accelerate, several with commas, or `none`; without its package it is skipped.
        dry_run: load the model, print what would be trained, and stop.
        out: run folder, for all results (default: a new one under `runs`).
    """

    data: Path | None = None
    condition: str | None = None
    method: str = "controlnet"
    base: str = "bundled"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    train: tuple[str, ...] | None = None
    generated_images: int = 384
    validation: float = 0.1
    template: str = ""
    caption_dropout: float | None = None
    image_dropout: float = 0.1
    resolution: int | None = None
    crop: Crop = "center"
    flip: float = 0.0
    buckets: bool = True
    steps: int | None = None
    batch: int | None = None
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    schedule: str | None = None
    warmup: int = 0
    weight_decay: float = 0.01
    ema: float = 0.0
    timestep_sampling: Density | None = None
    dtype: Dtype | None = None
    quantize: tuple[str, ...] = ()
    shard_base: bool = False
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    cache: bool = True
    cache_folder: Path | None = None
    save_dtype: Dtype = "float32"
    seed: int = 0
    checkpoint_every: int = 0
    resume: bool = False
    preview_every: int | None = None
    strength: float = 1.0
    eval_seeds: int = 2
    grid_images: int = 6
    features: str = "bundled"
    tracker: str = "tensorboard"
    dry_run: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("validation", "image_dropout"):
            if not 0 <= getattr(self, name) < 1:
                given = getattr(self, name)
                raise OptionError(f"{name} is {given!r}; expected a fraction in [0, 1).", option=name, given=given)
        if not methods.get(self.method).conditions:
            supported = tuple(n for n in methods.names() if methods.get(n).conditions)
            message = f"method {self.method!r} has no condition; expected one of {', '.join(supported)}."
            raise OptionError(message, option="method", given=self.method, expected=supported)
        unknown = sorted(set(self.options) - {self.method})
        if unknown:
            message = f"options for {', '.join(unknown)}, but the run trains {self.method}."
            raise OptionError(message, option="options", given=tuple(unknown), expected=(self.method,))
        if self.condition is not None and (maps.get(self.condition).name == "image") != self.uses_image_embeddings:
            expected = "image" if self.uses_image_embeddings else "a map"
            message = f"{self.method} does not support condition {self.condition!r}; expected {expected}."
            raise OptionError(message, option="condition", method=self.method, given=self.condition)

    @property
    def uses_image_embeddings(self) -> bool:
        """True for a method conditioned on image embeddings, False for maps."""
        return "embeds" in methods.get(self.method).conditions

    def with_defaults(self) -> ControlConfig:
        """The config with all defaults resolved: the base model's preset and a new results folder."""
        check_features(self.features)
        self.check_training_options()
        check_dtypes(self.dtype, self.mixed_precision, self.save_dtype)
        check_sharding(self.shard_base, self.quantize)
        quantized = base_models.parse_quantize(self.quantize, self.mixed_precision)
        known = base_models.preset(self.base).training.get(self.method, {})
        condition = self.condition or ("image" if self.uses_image_embeddings else "canny")
        resolved: dict[str, Any] = {
            "condition": condition,
            "steps": self.default_steps() if self.steps is None else self.steps,
            "batch": int(known.get("batch", 4)) if self.batch is None else self.batch,
            "schedule": self.schedule or str(known.get("schedule", "constant")),
            "learning_rate": self._rate(known),
            "options": {self.method: {**known.get("options", {}), **self.options.get(self.method, {})}},
            "out": self.out or new_folder(Path("runs"), f"{condition}-{self.method}", self.resume),
        }
        if self.preview_every is None:
            resolved["preview_every"] = max(1, resolved["steps"] // 4)
        if self.train is None:
            resolved["train"] = ("attn.out", "xattn.out") if self.method == "controlnext" else ()
        if train := resolved.get("train", self.train):
            self._reject_quantized(train, quantized)
            resolved["dtype"] = self._dtype_of_trained_base()
        if self.caption_dropout is None:
            resolved["caption_dropout"] = float(known.get("caption_dropout", 0.1 if self.uses_image_embeddings else 0.5))
        if self.timestep_sampling is None and self.method == "t2i_adapter":
            resolved["timestep_sampling"] = "cubic"
        config = dataclasses.replace(self, **resolved)
        config.loop(), config.objective(), config.build_method()
        return config

    def _reject_quantized(self, train: Sequence[str], quantized: Collection[str]) -> None:
        """Raises `OptionError` if the denoiser is quantized, whose weights train."""
        if {"", "unet", "transformer"} & {*quantized}:
            message = (
                f"{self.method} trains base weights as well (--train {' '.join(train)}), and quantized weights cannot train. "
                "Leave out --quantize of the denoiser, or use a method without base weights, such as controlnet."
            )
            raise OptionError(message, option="quantize", method=self.method, given=self.quantize, expected=())

    def _dtype_of_trained_base(self) -> Dtype:
        """float32: base weights that train are in it.

        Raises:
            OptionError: another dtype was set.
        """
        if self.dtype not in (None, "float32"):
            message = f"dtype is {self.dtype}, but base weights train as well (--train), in float32; expected --dtype float32."
            raise OptionError(message, option="dtype", given=self.dtype, expected="float32")
        return "float32"

    def _rate(self, known: Mapping[str, Any]) -> float:
        default = float(known.get("learning_rate", methods.get(self.method).learning_rate))
        return default if self.learning_rate is None else self.learning_rate

    def default_steps(self) -> int:
        """Default number of optimizer steps on the base model."""
        return int(base_models.preset(self.base).training.get(self.method, {}).get("steps", 20_000))

    def build_method(self) -> Method:
        """The method's config."""
        return check_options(self.method, self.options.get(self.method, {}))

    def loop(self) -> TrainConfig:
        """Configuration of the training loop."""
        return loop_config(self)

    def objective(self) -> ObjectiveOptions:
        """Options of the objective."""
        return ObjectiveOptions(density=self.timestep_sampling)

    def identity(self) -> dict[str, Any]:
        """Settings that must match on resume, besides those of the loop and the digests of the images."""
        return run_identity(self, WITHOUT_EFFECT)

"""Configuration of `veneer personalize`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from veneer import base_models, methods
from veneer.base_models.devices import Dtype, Precision
from veneer.injection.errors import OptionError

from .attach_methods import check_options, trains_token_embeddings
from .concepts.concept import concepts_of, default_subject, new_tokens, rename_fields
from .data.buckets import Crop
from .data.dataset_fields import DatasetFields
from .evaluation.fields import EvaluationFields
from .families.learning_rates import family_learning_rates
from .initial_adapter import trigger_words
from .loop.config import TrainConfig, check_dtypes, check_sharding, loop_config, run_identity
from .method_names import split_methods
from .objective.loss_weighting import LossWeighting
from .objective.losses import LossKind
from .objective.noise import NoiseOptions
from .objective.objectives import ObjectiveOptions
from .objective.timestep_sampling import Density
from .report.run_folder import new_folder
from .training_options import NOT_COMPARED, DiffusionTrainingOptions, SiteOptions

LABELS = ("{concept}",), ("{concept}",), ("207", "360", "387", "974")
"""Captions, prompts and drift prompts of base models with ImageNet labels: the last are four of DiT's samples."""

WITHOUT_EFFECT = (
    *NOT_COMPARED, "photos", "base", "steps", "learning_rate", "cache", "cache_folder", "resume", "prompts", "drift_prompts",
    "eval", "eval_seeds", "features", "dry_run", "check", "out", "truncate", "dtype", "save_dtype", "offload_encoders",
    "shard_base", "datasets", "validation", "validation_every",
)  # fmt: skip
"""Options that may change when a run is resumed, or that are compared by content."""


@dataclass(frozen=True)
class PersonalizeConfig(DatasetFields, EvaluationFields, DiffusionTrainingOptions, SiteOptions):
    """Configuration of `veneer personalize` and its defaults.

    Args:
        photos: folder with photos of one subject or style, no subfolders, or one photo (default: the bundled example photos).
        concept: trigger token in captions and prompts, such as `<toy>`; required with photos of your own. `pivotal` trains it as
            a new token. For DiT a class label, by name or number.
        base: base model: `bundled`, a folder, a .safetensors file or a hub name, of SD 1.x, SD 2, SDXL, SD3, FLUX, FLUX.2,
            Chroma, Sana, Krea 2, PixArt, DiT, Z-Image, Qwen-Image, Lumina 2, CogView4, AuraFlow, LongCat-Image, HunyuanDiT,
            HunyuanImage, Ovis-Image, Bria, HiDream-I1, ERNIE-Image, Ideogram 4, Kandinsky 5, OmniGen, PRX, Wan or
            HunyuanVideo.
        method: a method of `veneer methods`, several joined by `+`, or `pivotal` (token and LoRA); `pez` searches a prompt and
            trains no adapter; `--method NAME --help` has its options.
        options: method name to its options.
        text_encoder: also train adapters on the attention layers of all text encoders.
        class_word: ordinary word for the subject, such as `toy`: initial value of its new token, and its name in class images.
        class_images: number of class (regularization) images to generate for prior preservation, with `class_word`; 0: none.
        prior_loss_weight: weight of the loss on class images.
        template: captions for photos without one, with {concept} for the trigger token; one is sampled in each step (default: the
            preset's, such as `a photo of {concept}`).
        caption_dropout: probability of an empty caption in a step, 0 to 1.
        tag_dropout: probability of dropping each comma-separated tag of a caption, 0 to 1.
        keep_tokens: number of tags at the start of a caption that `tag_dropout` and `shuffle_tags` leave in place.
        shuffle_tags: shuffle the comma-separated tags of a caption in each step.
        resolution: side of the training images in pixels; with buckets the square root of their area (default: the base model's).
        crop: part of the photo that a crop keeps; `random` samples it in each step.
        flip: probability of a horizontal flip, 0 to 1; leave it at 0 for faces and text.
        buckets: aspect-ratio buckets: train at the photos' aspect ratios; otherwise on square crops.
        masks: weight the loss with masks: `NAME.mask.png` beside the photo, `masks/NAME.png`, or its alpha channel.
        steps: optimizer steps of `batch` × `gradient_accumulation_steps` images; E epochs of P photos are E × P divided by that
            (default: the preset's, such as 300 with the bundled model, else 500).
        batch: images per micro-batch, in total over all processes (default: the preset's, else 1).
        gradient_accumulation_steps: micro-batches per optimizer step.
        learning_rate: peak learning rate, except of token embeddings beside adapters (default: the preset's, else
            0.0001 for lora and dora, else the method's).
        text_learning_rate: learning rate of adapters in text encoders (default: half of `learning_rate`).
        token_learning_rate: learning rate of token embeddings beside adapters (default: the preset's, else 0.005).
        schedule: learning-rate schedule: `constant`, `cosine`, `cosine_with_restarts`, `linear`, `polynomial` or `rex` (default:
            the preset's, else constant).
        warmup: optimizer steps of linear warmup before the schedule.
        weight_decay: decoupled weight decay of all trained parameters.
        ema: decay of an exponential moving average of the trained weights, such as 0.999, which is saved instead; 0 disables it.
        min_snr_gamma: gamma of min-SNR loss weighting, typically 5, which it enables; 0: none, or 5 with that loss weighting.
        loss_weighting: weight of the loss by noise level: `none`, `min_snr`, `min_snr_plus_one`, `debiased`, `snr_scaled_v` (for
            v-prediction), or for flow matching (SD3, FLUX) `sigma_sqrt` or `cosmap`.
        timestep_sampling: distribution of the noise level in training: `uniform`, `logit_normal`, `mode`, `cubic`, `sigmoid`, and
            for flow matching `shift` or `flux_shift` (default: logit_normal for SD3, else uniform). `logit_normal` has mean 0;
            diffusers' scripts count from the noisy end, so that their `--logit_mean` has the other sign.
        prediction: what the model predicts, such as `v_prediction`, if its config is wrong (default: that of the config).
        loss: distance of prediction and target; `huber` and `smooth_l1` weight outliers less.
        noise_offset: strength of the noise offset, for darker and brighter images, typically 0.05 to 0.1; 0 disables it.
        pyramid_noise: discount of pyramid (multi-resolution) noise, 0 to 1, typically 0.3; 0 disables it.
        input_perturbation: gamma of input perturbation, typically 0.1; 0 disables it.
        cache: cache latents and text embeddings; random crops and text encoders that train are computed in each step anyway.
        cache_folder: folder for the cache, which later runs reuse (default: in memory).
        offload_encoders: move VAE and text encoders to the CPU once their outputs are cached; on one GPU, or with `shard_base`.
        dtype: dtype of the frozen base model; adapters train in float32 (default: bfloat16 on a GPU, float32 on a CPU). float16
            needs `--mixed-precision fp16`.
        quantize: quantization of the denoiser's frozen linear layers: `nf4`, `nf4-dq`, `fp4`, `fp4-dq`, `int4`, `int8`,
            `int8-torchao`, `int8-quanto`, `fp8`, or a GGUF file; with COMPONENT=KIND of other components, such as
            `text_encoder_2=int8`; with a rank, such as `nf4+loftq16`, for `--init loftq` (default: none).
        shard_base: split the frozen weights over the processes of `accelerate launch` (FSDP2); not with `quantize`.
        mixed_precision: autocast of the forward pass to this dtype; `no` disables it.
        gradient_checkpointing: recompute activations in the backward pass: less memory, slower steps.
        save_dtype: dtype of the trained parameters in the files; training stays in float32.
        seed: seed of all random numbers.
        checkpoint_every: optimizer steps between checkpoints for `resume`; two are kept; 0: one only when stopped, as by Ctrl+C.
        resume: continue from the newest checkpoint in `out`.
        preview_every: optimizer steps between preview images, in `previews` of the run folder; 0 disables them.
        prompts: prompts of previews and of the evaluation, with {concept} in them (default: the preset's).
        drift_prompts: prompts without the concept, on which drift from the base model is measured (default: the preset's).
        tracker: logger of loss and metrics: `tensorboard` (in `logs` of the run folder), `wandb`, `comet_ml`, `mlflow` or others
            of accelerate, several with commas, or `none`; without its package it is skipped.
        truncate: captions longer than the text encoder accepts, 77 tokens for CLIP: `error` rejects them, `warn` truncates them.
        dry_run: load the model, print what would be trained, with memory and time, and stop.
        check: print the memory of the run and whether it fits into a size such as `12GB`, or into the free memory of `cpu` or
            `cuda`, and stop; loads no weights, so that `base` may be an architecture, such as `flux`, `sdxl` or `sd35`.
        out: run folder, for all results (default: a new one under `runs`).
    """

    photos: Path | None = None
    concept: str = ""
    base: str = "bundled"
    method: str = "lora"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    text_encoder: bool = False
    class_word: str = ""
    class_images: int = 0
    prior_loss_weight: float = 1.0
    template: tuple[str, ...] | None = None
    caption_dropout: float = 0.0
    tag_dropout: float = 0.0
    keep_tokens: int = 0
    shuffle_tags: bool = False
    resolution: int | None = None
    crop: Crop = "center"
    flip: float = 0.0
    buckets: bool = True
    masks: bool = True
    steps: int | None = None
    batch: int | None = None
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    text_learning_rate: float | None = None
    token_learning_rate: float | None = None
    schedule: str | None = None
    warmup: int = 0
    weight_decay: float = 0.01
    ema: float = 0.0
    min_snr_gamma: float = 0.0
    loss_weighting: LossWeighting = "none"
    timestep_sampling: Density | None = None
    prediction: str | None = None
    loss: LossKind = "l2"
    noise_offset: float = 0.0
    pyramid_noise: float = 0.0
    input_perturbation: float = 0.0
    cache: bool = True
    cache_folder: Path | None = None
    offload_encoders: bool = True
    dtype: Dtype | None = None
    quantize: tuple[str, ...] = ()
    shard_base: bool = False
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    save_dtype: Dtype = "float32"
    seed: int = 0
    checkpoint_every: int = 0
    resume: bool = False
    preview_every: int = 0
    prompts: tuple[str, ...] | None = None
    drift_prompts: tuple[str, ...] | None = None
    tracker: str = "tensorboard"
    truncate: Literal["error", "warn"] = "error"
    dry_run: bool = False
    check: str | None = None
    out: Path | None = None

    def with_defaults(self) -> PersonalizeConfig:
        """The config with all defaults resolved: example photos, the base model's preset, and a new results folder.

        Raises:
            VeneerError: photos without a concept, an unknown feature model, or a value out of range.
            ValueError: a method option out of range.
        """
        resolved: dict[str, Any] = {**trigger_words(self.init_from, self.concept, self.class_word)}
        resolved |= default_subject(dataclasses.replace(self, **resolved))
        resolved |= self.evaluation_defaults(self.base)
        preset = base_models.preset(self.base)
        names = split_methods(self.method)
        known = {name: dict(preset.training.get(name, {})) for name in names}
        first = {key: value for m in reversed(known.values()) for key, value in m.items()}
        resolved["where"] = self.selection() or (tuple(first["where"]) if "where" in first else None)
        resolved["target_modules"] = ()
        resolved["steps"] = self.default_steps() if self.steps is None else self.steps
        resolved["batch"] = int(first.get("batch", 1)) if self.batch is None else self.batch
        resolved["schedule"] = str(first.get("schedule", "constant")) if self.schedule is None else self.schedule
        resolved["options"] = {**self.options, **{n: {**known[n].get("options", {}), **self.options.get(n, {})} for n in names}}
        name = f"{_plain(resolved['concept'])}-{self.method}"
        resolved["out"] = self.out or new_folder(Path("runs"), name, self.resume)
        return dataclasses.replace(self, **resolved)._checked()

    def _checked(self) -> PersonalizeConfig:
        """The config, after checks of its values before a base model is loaded."""
        self.loop(), self.objective(), self.noise(), base_models.parse_quantize(self.quantize, self.mixed_precision)
        self.check_training_options()
        check_dtypes(self.dtype, self.mixed_precision, self.save_dtype)
        check_sharding(self.shard_base, self.quantize)
        self.check_validation()
        for name in ("eval_seeds", "class_images"):
            if (given := getattr(self, name) or 0) < 0:
                raise OptionError(f"{name} is {given}; expected at least 0.", option=name, given=given, expected=0)
        if self.min_snr_gamma and self.loss_weighting not in (fitting := ("none", "min_snr", "min_snr_plus_one")):
            message = f"min_snr_gamma has no effect with the loss weighting {self.loss_weighting!r}; expected min_snr or none."
            raise OptionError(message, option="min_snr_gamma", given=self.min_snr_gamma, expected=fitting)
        if self.loss not in (kinds := get_args(LossKind)):
            raise OptionError(f"loss is {self.loss!r}; expected one of {kinds}.", option="loss", given=self.loss, expected=kinds)
        for name in split_methods(self.method):
            if not trains_token_embeddings(methods.get(name)):  # their token is chosen later
                check_options(name, self.options.get(name, {}))
        return self

    def with_captions(self, labels: bool) -> PersonalizeConfig:
        """The config with the default captions and prompts of the base model.

        Args:
            labels: whether the base model is conditioned on class labels instead of text.
        """
        preset = base_models.Preset(*LABELS) if labels else base_models.preset(self.base)
        defaults = {"template": preset.templates, "prompts": preset.previews, "drift_prompts": preset.unrelated}
        texts: dict[str, Any] = {name: getattr(self, name) or default for name, default in defaults.items()}
        return dataclasses.replace(self, **texts)

    def with_token(self, tokenizers: Sequence[Any]) -> PersonalizeConfig:
        """The config with the trained tokens as the concepts, also in prompts and templates; see `new_token`."""
        names = split_methods(self.method)
        chosen = any("tokens" in self.options.get(n, {}) for n in names)
        if chosen or not any(trains_token_embeddings(methods.get(n)) for n in names):
            return self
        return dataclasses.replace(self, **rename_fields(self, new_tokens(concepts_of(self), tokenizers)))

    def rates(self) -> dict[str, float]:
        """Learning rate of each method: the configured one, else the default."""
        rates = self.default_rates()
        for name in rates:
            is_token_rate = trains_token_embeddings(methods.get(name)) and len(rates) > 1
            configured = self.token_learning_rate if is_token_rate else self.learning_rate
            rates[name] = rates[name] if configured is None else configured
        return rates

    def default_steps(self) -> int:
        """Default number of optimizer steps on the base model: the maximum over the methods."""
        known = base_models.preset(self.base).training
        return max(int(known.get(name, {}).get("steps", 500)) for name in split_methods(self.method))

    def default_rates(self) -> dict[str, float]:
        """Default learning rate of each method: the preset's; without one that of the base model's family, else the method's."""
        known = base_models.preset(self.base).training
        of_family = {} if known else family_learning_rates(self.base)
        rates = {name: of_family.get(name, methods.get(name).learning_rate) for name in split_methods(self.method)}
        return {name: float(known.get(name, {}).get("learning_rate", rate)) for name, rate in rates.items()}

    def text_rate(self) -> float:
        """Learning rate of weights in text encoders."""
        return self.text_learning_rate or 0.5 * self.main_rate()

    def main_rate(self) -> float:
        """Base learning rate, to which others are relative: that of the first method on weights, or of the only method."""
        rates = self.rates()
        on_weights = [rate for name, rate in rates.items() if not trains_token_embeddings(methods.get(name))]
        return [*on_weights, *rates.values()][0]

    def loop(self) -> TrainConfig:
        """Configuration of the training loop."""
        return loop_config(self, learning_rate=self.main_rate())

    def objective(self) -> ObjectiveOptions:
        """Options of the objective."""
        weighting = "min_snr" if self.min_snr_gamma and self.loss_weighting == "none" else self.loss_weighting
        gamma = self.min_snr_gamma or 5.0
        return ObjectiveOptions(density=self.timestep_sampling, weighting=weighting, gamma=gamma, prediction=self.prediction)

    def identity(self) -> dict[str, Any]:
        """Settings that must match on resume, besides those of the loop and the digests of the images."""
        kept = run_identity(self, {*WITHOUT_EFFECT} - {"datasets"})
        return {**kept, "datasets": [{k: v for k, v in table.items() if k != "path"} for table in kept["datasets"]]}

    def noise(self) -> NoiseOptions:
        """Options of the noise."""
        return NoiseOptions(offset=self.noise_offset, pyramid=self.pyramid_noise, perturbation=self.input_perturbation)


def _plain(word: str) -> str:
    return re.sub(r"[^\w-]+", "", word) or "concept"

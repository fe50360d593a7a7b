"""Base class of pipeline families: components, encoding of images and text, and the call of the denoiser."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.injection.errors import BaseModelError, OptionError

from ..objective.objectives import Objective, ObjectiveOptions, from_scheduler
from .pipeline_outputs import generated_images, posterior
from .prompt_limits import PromptLimits

Sizes = Tensor | Sequence[Sequence[int]]
"""(original height, width, crop top, left, target height, width) of each sample, in pixels."""


class Family(PromptLimits, ABC):
    """A family of diffusers pipelines. Each module in a sub-package of `families/` with a subclass is registered automatically.

    Class attributes:
        pipelines: supported pipeline classes (and their subclasses), the text-to-image one first.
        needs: components that must not be None. `denoiser`: the component that is trained.
        learning_rates: method to its default learning rate on base models without a preset; the others have the method's. Those
            of LoRA and DoRA are the ones of diffusers' training scripts.
        density: default timestep density. `packing`: number of latents per channel vector of the denoiser.
        square: True if only square images are supported. `frames`: True if the VAE is one of videos, (batch, channels, frames,
            height, width), of which an image is a frame. `single_prompt`: True if the pipeline takes one prompt in a call.

    Attributes:
        pipe: the pipeline; each call uses its current components. On the meta device it needs no tokenizers.
        guidance: guidance input of guidance-distilled transformers (FLUX.1-dev), else unused.
        max_tokens: number of T5 tokens (default: that of the pipeline); CLIP uses its tokenizer's maximum.
        truncate: for prompts above the token limit: `error`, or `warn` and truncate as the pipeline does.
    Raises:
        BaseModelError: a missing component, or a denoiser with more input channels than the VAE's latents.
    """

    pipelines: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]]
    denoiser: ClassVar[str]
    learning_rates: ClassVar[Mapping[str, float]] = MappingProxyType({"lora": 1e-4, "dora": 1e-4})
    density: ClassVar[str] = "uniform"
    packing: ClassVar[int] = 1
    square: ClassVar[bool] = False
    frames: ClassVar[bool] = False
    single_prompt: ClassVar[bool] = False

    def __init__(
        self, pipe: Any, *, truncate: Literal["error", "warn"] = "error", max_tokens: int | None = None, guidance: float = 3.5
    ) -> None:
        if truncate not in ("error", "warn"):
            message = f"truncate must be 'error' or 'warn', got {truncate!r}"
            raise OptionError(message, option="truncate", given=truncate, expected=("error", "warn"))
        self.pipe = pipe
        self.truncate = truncate
        self.max_tokens = max_tokens
        self.guidance = guidance
        spare = "tokenizer" if str(getattr(getattr(pipe, self.denoiser, None), "device", "")) == "meta" else None
        missing = [n for n in self.needs if getattr(pipe, n, None) is None and not (spare and n.startswith(spare))]
        if missing:
            message = (
                f"{type(pipe).__name__} has no {', '.join(missing)}. Training needs {', '.join(self.needs)}: load a complete "
                f"base model, or pass the missing component to from_pretrained({missing[0]}=…)."
            )
            raise BaseModelError(message, where="missing", given=tuple(missing), expected=self.needs)
        channels, latent = self.input_channels, self.packing * self.latent_channels
        if channels != latent:
            message = (
                f"the {self.denoiser} has {channels} input channels, the VAE {latent} latent channels: an inpainting, depth, "
                "control or editing model, whose extra inputs photos do not have. Use its text-to-image base model."
            )
            raise BaseModelError(message, where=self.denoiser, given=channels, expected=latent)

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        """True if the pipeline's class, or a base of it, is named in `pipelines`."""
        return any(base.__name__ in cls.pipelines for base in type(pipe).__mro__)

    @property
    def tower(self) -> nn.Module:
        """The UNet or transformer."""
        tower: nn.Module = getattr(self.pipe, self.denoiser)
        return tower

    @property
    def config(self) -> Any:
        """The denoiser's config."""
        return self.pipe.components[self.denoiser].config

    @property
    def input_channels(self) -> int:
        """Channels of the denoiser's input."""
        return int(self.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        config = self.pipe.vae.config
        return int(config.get("latent_channels") or config.z_dim)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along a side."""
        vae = self.pipe.vae
        return int(getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1))

    @property
    def multiple(self) -> int:
        """Image sides must be divisible by this, pixels: the VAE's factor times the patch size or the UNet's downsampling.

        Packed latents are patches of 2×2.
        """
        if self.packing == 4:
            return 2 * self.vae_factor
        halvings = len(self.config.get("block_out_channels", ("",))) - 1
        return self.vae_factor * int(self.config.get("patch_size", 2**halvings))

    @property
    def resolution(self) -> int:
        """Native resolution of the base model, pixels per side."""
        return self.vae_factor * int(self.config.sample_size)

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor on the device and in the dtype of the denoiser's first floating-point weight."""
        weight = next(p for p in self.tower.parameters() if p.is_floating_point())
        return tensor.to(weight.device, weight.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return next(self.tower.parameters()).device

    def tokens(self, height: int, width: int) -> int:
        """Number of 2×2 latent patches of an image of that size in pixels."""
        return (height // self.vae_factor // 2) * (width // self.vae_factor // 2)

    def objective(self, options: ObjectiveOptions | None = None) -> Objective:
        """The objective of the pipeline's scheduler, with the family's density if the options have none."""
        options = replace(options or ObjectiveOptions(), tokens=self.tokens(self.resolution, self.resolution))
        return from_scheduler(self.pipe.scheduler, options, self.density)

    # -- images -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of the scaled latents: ((μ − shift)·scale, σ·scale), float32, each (batch, channels, height, width).

        Args:
            pixels: (batch, 3, H, W) in [−1, 1], sides divisible by `multiple`.
        Raises:
            OptionError: sides that are not divisible.
        A float16 VAE with `force_upcast` runs in float32 and is cast back.
        """
        vae = self.pipe.vae
        if any(side % self.multiple for side in pixels.shape[-2:]):
            given = tuple(pixels.shape[-2:])
            message = f"image sides must be divisible by {self.multiple}, got {given}"
            raise OptionError(message, option="pixels", given=given, expected=self.multiple)
        dtype = vae.dtype
        upcast = dtype == torch.float16 and vae.config.get("force_upcast", False)
        if upcast:
            vae.to(torch.float32)
        try:
            mean, std = posterior(vae.encode(self.with_frame(pixels.to(vae.device, vae.dtype))))
        finally:
            if upcast:
                vae.to(dtype)
        shift, scale = self._latent_affine()
        mean, std = (part.squeeze(2) if self.frames else part for part in (mean.float(), std.float()))
        return (mean - shift) * scale, std * scale

    def with_frame(self, images: Tensor) -> Tensor:
        """Images or latents (batch, channels, height, width) as the VAE takes them: as one frame if it is a VAE of videos."""
        return images.unsqueeze(2) if self.frames else images

    def _latent_affine(self) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale) of the VAE's config: floats, or per channel if it has `latents_mean` and `latents_std`."""
        config = self.pipe.vae.config
        scale = float(config.get("scaling_factor") or 1.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            device = self.pipe.vae.device
            return torch.tensor(mean, device=device).view(1, -1, 1, 1), scale / torch.tensor(std, device=device).view(1, -1, 1, 1)
        return float(config.get("shift_factor") or 0.0), scale

    def latents(self, mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
        """mean + std·n with n ~ N(0, 1) from a CPU generator; shape and device of `mean`."""
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean)

    # -- text ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """Text conditioning of the denoiser: named tensors, batch first, equal to the pipeline's own `encode_prompt`.

        Gradients flow into the text encoders and their token embeddings.
        Raises:
            PromptError: a prompt exceeds the token limit and `truncate` is `error`.
        """

    @property
    def text_device(self) -> torch.device:
        """Device of the text encoders."""
        return next(p.device for tower in self.text_towers.values() for p in tower.parameters())

    @abstractmethod
    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        """Tensors on the meta device with the shapes and dtypes that `encode_text` returns for `rows` prompts."""

    def join_text(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One batch of several outputs of `encode_text`; sequences (batch, tokens, …) are padded with zeros to the longest."""
        return {name: _joined([row[name] for row in rows]) for name in rows[0]}

    # -- the denoiser -------------------------------------------------------------------------------------------------

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        """The denoiser's raw prediction, in the shape of `noisy`, called exactly as the pipeline's own loop calls it.

        Args:
            noisy: (batch, channels, height, width), cast to the denoiser's dtype.
            timesteps: (batch,), from `Objective.model_input`.
            text: from `encode_text`.
            sizes: size conditioning, if the model has it (default: uncropped images of the latents' size).
        """

    def sizes(self, noisy: Tensor, sizes: Sizes | None) -> Tensor:
        """(batch, 6) float32 on the device of `noisy`: `sizes`, or those of uncropped images of the latents' size."""
        if sizes is None:
            height, width = (side * self.vae_factor for side in noisy.shape[-2:])
            sizes = [(height, width, 0, 0, height, width)] * len(noisy)
        return torch.as_tensor(sizes, dtype=torch.float32, device=noisy.device)

    @torch.no_grad()
    def generate(self, prompts: list[str], generators: list[torch.Generator], **settings: Any) -> list[Any]:
        """Generates one PIL image per prompt and generator with the pipeline's text-to-image class, in `eval` mode.

        A family with `single_prompt` generates one image in a call.

        Args:
            settings: pipeline arguments: `num_inference_steps`, `guidance_scale`, `height`, `width`, …; None for its default.
        """
        import diffusers

        if self.single_prompt and len(prompts) > 1:
            rows = zip(prompts, generators, strict=True)
            return [image for prompt, generator in rows for image in self.generate([prompt], [generator], **settings)]
        pipe, is_main = self.pipe, type(self.pipe).__name__ == self.pipelines[0]
        if not is_main and "image" in inspect.signature(type(pipe).__call__).parameters:  # an image-to-image pipeline
            pipe = getattr(diffusers, self.pipelines[0]).from_pipe(pipe, torch_dtype=None)  # shares the components
            pipe.set_progress_bar_config(disable=True)
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        modes = [(module, module.training) for part in parts for module in part.modules()]
        try:
            for part in parts:
                part.eval()
            arguments = {name: value for name, value in settings.items() if value is not None}
            arguments = self.sampling_arguments(arguments, len(prompts))
            return generated_images(pipe(**self.inputs(prompts), generator=generators, **arguments))
        finally:
            for module, training in modes:
                module.training = training

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        """Arguments of the pipeline for settings by their common names.

        Args:
            arguments: such as `guidance_scale`, the scale of classifier-free guidance, and `negative_prompt`, one per prompt.
            prompts: number of prompts.
        """
        return arguments

    def inputs(self, prompts: list[str]) -> dict[str, Any]:
        """Pipeline arguments of the prompts."""
        return {"prompt": list(prompts)}  # a copy: some pipelines apply their chat template in place


def _joined(parts: list[Tensor]) -> Tensor:
    """The concatenation of batches, (batch, …) or (batch, tokens, …); shorter sequences are padded with zeros."""
    longest = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else 0
    return torch.cat([pad(part, longest) if part.ndim > 1 else part for part in parts])


def pad(sequence: Tensor, tokens: int) -> Tensor:
    """(batch, n, …) with n at most `tokens` → (batch, tokens, …), with zeros at the end."""
    missing = sequence.new_zeros(len(sequence), tokens - sequence.shape[1], *sequence.shape[2:])
    return torch.cat([sequence, missing], dim=1)

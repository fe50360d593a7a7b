"""Wan 2.1 and 2.2: a flow transformer over latents of videos, conditioned on UMT5; in 2.2 an expert for each range of noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection.errors import BaseModelError

from ...objective.objectives import Flow, Objective, ObjectiveOptions
from ..family import Family, Sizes
from ..pipeline_resolution import CallResolution, call_default
from ..row_groups import predict_by_group

EXPERTS = ("transformer", "transformer_2")
"""The expert of high noise levels, which the models without experts have alone, and the one of low noise levels."""


class FlowWithin(Flow):
    """Flow whose noise levels are in the range from `low` to `high`: σ′ = low + σ·(high − low), as in musubi-tuner."""

    def sample_timestep(self, generator: torch.Generator, tokens: int | None = None) -> float:
        sigma = super().sample_timestep(generator, tokens)
        return max(self.low + sigma * (self.high - self.low), 1 / self.steps)


class Wan(CallResolution, Family):
    """ε − x₀ = transformer(x_σ, σ·1000, text), with an image as a video of one frame.

    Text is padded with zeros, without a mask. With `boundary_ratio`, `transformer` predicts the noise levels from it on, and
    `transformer_2` those below; adapters train on both, or, where only one has trainable parameters, on its noise levels.
    Source: Wan team 2025; diffusers `WanPipeline`. The text-to-image-to-video model has a time for each token.

    Raises:
        BaseModelError: a `boundary_ratio` without `transformer_2`.
    """

    pipelines = ("WanPipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    frames = True

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        if pipe.config.boundary_ratio is not None and pipe.transformer_2 is None:
            message = (
                f"{type(pipe).__name__} has boundary_ratio={pipe.config.boundary_ratio} and no transformer_2, the expert for the "
                "noise levels below it. Load a complete base model."
            )
            raise BaseModelError(message, where="missing", given=("transformer_2",), expected=(*self.needs, "transformer_2"))

    @property
    def multiple(self) -> int:
        """Pixels: the VAE's factor times the patch size."""
        return self.vae_factor * int(self.config.patch_size[1])

    @property
    def text_tokens(self) -> int:
        """`max_tokens`, or the default of the pipeline, which is above that of its `encode_prompt`."""
        return self.max_tokens or int(call_default(type(self.pipe), "max_sequence_length"))

    def token_limit(self, tokenizer: Any) -> int:
        return self.text_tokens

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return [prompt_clean(prompt) for prompt in prompts]

    def objective(self, options: ObjectiveOptions | None = None) -> Objective:
        """Noise levels are those of the experts with trainable parameters."""
        objective, boundary = super().objective(options), self.pipe.config.boundary_ratio
        trained = [name for name in EXPERTS if any(p.requires_grad for p in self._expert(name).parameters())]
        if boundary is None or len(trained) != 1 or not isinstance(objective, Flow):
            return objective
        within = FlowWithin(objective.options, objective.steps, objective.shift, objective.mu)
        within.low, within.high = (boundary, 1.0) if trained == ["transformer"] else (0.0, boundary - 1 / objective.steps)
        return within

    def _expert(self, name: str) -> nn.Module:
        expert: nn.Module = getattr(self.pipe, name) or self.tower
        return expert

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width), zeros after the prompt."""
        self.check_length(prompts)
        embeds, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.text_device, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        shape = rows, self.text_tokens, self.config.text_dim
        return {"prompt_embeds": torch.empty(shape, dtype=self.pipe.text_encoder.dtype, device="meta")}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        names, boundary = [EXPERTS[0]] * len(noisy), self.pipe.config.boundary_ratio
        if boundary is not None and not timesteps.is_meta:
            first = boundary * self.pipe.scheduler.config.num_train_timesteps
            names = [EXPERTS[t < first] for t in timesteps.tolist()]
        inputs = self.with_frame(self.cast(noisy)), timesteps, self.cast(text["prompt_embeds"])
        return predict_by_group(names, self._predict, *inputs).squeeze(2)

    def _predict(self, name: str, noisy: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """The prediction of an expert for videos of one frame."""
        if self.pipe.config.expand_timesteps:
            patch = int(self.config.patch_size[1])
            timesteps = timesteps[:, None].expand(-1, noisy.shape[-2] // patch * (noisy.shape[-1] // patch))
        output: Tensor = self._expert(name)(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=embeds, return_dict=False
        )[0]
        return output

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        return arguments | {"num_frames": 1, "output_type": "pil"}

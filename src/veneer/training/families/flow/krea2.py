"""Krea 2: a flow transformer over packed 2×2 latents, which fuses several layers of a vision-language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...objective.objectives import Flow, Objective, ObjectiveOptions
from ..family import Family, Sizes
from ..pipeline_resolution import CallResolution
from ..prompt_limits import LanguageModelLimits
from .flux import pack, positions, unpack


class Krea2(LanguageModelLimits, CallResolution, Family):
    """ε − x₀ = unpack(transformer(pack(x_σ), σ, layers of the text, text mask, positions)).

    A prompt is within the pipeline's template, with its padding before the template's end. The distilled model has a constant μ
    of `flux_shift`, 1.15.
    Source: Krea 2026; diffusers `Krea2Pipeline`.
    """

    pipelines = ("Krea2Pipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packing = 4
    frames = True

    def objective(self, options: ObjectiveOptions | None = None) -> Objective:
        objective = super().objective(options)
        if isinstance(objective, Flow) and self.pipe.config.is_distilled:
            objective.mu = (1.15, 1.15, *objective.mu[2:])
        return objective

    def token_limit(self, tokenizer: Any) -> int:
        """Includes the tokens of the template that are dropped, and leaves those of its end."""
        return self.text_tokens + self.pipe.prompt_template_encode_start_idx - self.pipe.prompt_template_encode_num_suffix_tokens

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        """The prompts after the start of the template; its end is added behind the padding."""
        return [self.pipe.prompt_template_encode_prefix + prompt for prompt in prompts]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, layers, width) and `mask` (batch, tokens), True for text."""
        self.check_length(prompts)
        embeds, mask = self.pipe.encode_prompt(list(prompts), self.text_device, max_sequence_length=self.text_tokens)
        return {"prompt_embeds": embeds, "mask": mask}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        config, dtype = self.config, self.pipe.text_encoder.dtype
        shape = rows, self.text_tokens, config.num_text_layers, config.text_hidden_dim
        return {
            "prompt_embeds": torch.empty(shape, dtype=dtype, device="meta"),
            "mask": torch.empty(shape[:2], dtype=torch.bool, device="meta"),
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        (height, width), embeds = noisy.shape[-2:], self.cast(text["prompt_embeds"])
        places = torch.cat([torch.zeros(embeds.shape[1], 3), positions(height // 2, width // 2)])
        output = self.tower(
            hidden_states=pack(self.cast(noisy)),
            encoder_hidden_states=embeds,
            timestep=self.cast(timesteps / self.pipe.scheduler.config.num_train_timesteps),
            position_ids=places.to(noisy.device),
            encoder_attention_mask=text["mask"].to(noisy.device),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

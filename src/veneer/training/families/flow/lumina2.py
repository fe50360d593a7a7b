"""Lumina-Image 2: a flow transformer over tokens of text and image, conditioned on a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..prompt_limits import LanguageModelLimits
from ..text_masks import mask_shapes


class Lumina2(LanguageModelLimits, Family):
    """ε − x₀ = −transformer(x_σ, 1 − σ, text, text mask): the model predicts x₀ − ε, and its time is 0 for noise.

    Prompts follow the pipeline's system prompt; the text is the last but one hidden state. The empty prompt has no system prompt,
    as in the unconditional branch of the pipeline.
    Source: Qin et al. 2025; diffusers `Lumina2Pipeline`. Deviation: diffusers' training script reverses the noise level instead,
    which applies the shift of the scheduler to the other end.
    """

    pipelines = ("Lumina2Pipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        return [prompt and f"{self.pipe.system_prompt} <Prompt Start> {prompt}" for prompt in prompts]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width) and `mask` (batch, tokens), 1 for text and 0 for padding."""
        self.check_length(prompts)
        empty = torch.tensor([not prompt for prompt in prompts], device=self.text_device)
        embeds, mask, unconditional, unconditional_mask = self.pipe.encode_prompt(
            prompts, not all(prompts), device=self.text_device, max_sequence_length=self.text_tokens
        )
        if not all(prompts):
            embeds = torch.where(empty[:, None, None], unconditional, embeds)
            mask = torch.where(empty[:, None], unconditional_mask, mask)
        return {"prompt_embeds": embeds, "mask": mask}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        return mask_shapes(rows, self.text_tokens, self.config.cap_feat_dim, self.pipe.text_encoder.dtype)

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output: Tensor = self.tower(
            hidden_states=self.cast(noisy),
            timestep=1 - timesteps / self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            encoder_attention_mask=text["mask"].to(noisy.device),
            return_dict=False,
        )[0]
        return -output

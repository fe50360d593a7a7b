"""Ovis-Image: a flow transformer over packed 2×2 latents, conditioned on the language model of Ovis 2.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..flow.flux import pack, positions, unpack
from ..pipeline_resolution import PipelineResolution
from ..prompt_limits import LanguageModelLimits


class OvisImage(LanguageModelLimits, PipelineResolution, Family):
    """ε − x₀ = unpack(transformer(pack(x_σ), σ, text, positions)).

    Prompts follow the system prompt in the chat template, whose first tokens are dropped; padding is zeros.
    Source: AIDC-AI 2025; diffusers `OvisImagePipeline`.
    """

    pipelines = ("OvisImagePipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packing = 4

    def token_limit(self, tokenizer: Any) -> int:
        """Includes the tokens that are dropped."""
        return self.text_tokens + int(self.pipe.user_prompt_begin_id)

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        return list(self.pipe._get_messages(prompts))

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width)."""
        self.check_length(prompts)
        embeds, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.text_device, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        shape = rows, self.text_tokens, self.config.joint_attention_dim
        return {"prompt_embeds": torch.empty(shape, dtype=self.pipe.text_encoder.dtype, device="meta")}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        (height, width), embeds = noisy.shape[-2:], self.cast(text["prompt_embeds"])
        order = torch.arange(embeds.shape[1])
        output = self.tower(
            hidden_states=pack(self.cast(noisy)),
            timestep=self.cast(timesteps) / 1000,
            encoder_hidden_states=embeds,
            txt_ids=self.cast(torch.stack([torch.zeros_like(order), order, order], dim=1)),
            img_ids=self.cast(positions(height // 2, width // 2)),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

"""Stable Diffusion 3: a flow transformer conditioned on two CLIP text encoders and optionally T5."""

from __future__ import annotations

import torch
from torch import Tensor

from ..family import Family, Sizes


class StableDiffusion3(Family):
    """ε − x₀ = transformer(x_σ, σ·1000, text, pooled text). Source: Esser et al. 2024; diffusers `StableDiffusion3Pipeline`."""

    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    denoiser = "transformer"
    density = "logit_normal"

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, CLIP tokens + T5 tokens, width) and `pooled` (batch, both projections).

        Without T5 its tokens are zeros, as in the pipeline.
        """
        self.check_length(prompts)
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.text_device, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds, "pooled": pooled}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        text = self.pipe.text_encoder
        tokens, config = text.config.max_position_embeddings + self.text_tokens, self.config
        return {
            "prompt_embeds": torch.empty(rows, tokens, config.joint_attention_dim, dtype=text.dtype, device="meta"),
            "pooled": torch.empty(rows, config.pooled_projection_dim, dtype=text.dtype, device="meta"),
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output: Tensor = self.tower(
            hidden_states=self.cast(noisy),
            timestep=timesteps,
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            pooled_projections=self.cast(text["pooled"]),
            return_dict=False,
        )[0]
        return output

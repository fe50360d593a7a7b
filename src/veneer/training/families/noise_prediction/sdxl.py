"""Stable Diffusion XL: a UNet conditioned on two CLIP text encoders, a pooled text embedding and image sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..family import Family, Sizes


class StableDiffusionXL(Family):
    """ε = UNet(x_t, t, text, pooled text, time ids), time ids = (original h, w, crop top, left, target h, w).

    Source: Podell et al. 2023, section 2.2; diffusers `StableDiffusionXLPipeline`.
    """

    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    denoiser = "unet"

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width of both encoders) and `pooled` (batch, projection)."""
        self.check_length(prompts)
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.text_device, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        first, second, dtype = self.pipe.text_encoder.config, self.pipe.text_encoder_2.config, self.pipe.text_encoder.dtype
        width = first.hidden_size + second.hidden_size
        return {
            "prompt_embeds": torch.empty(rows, first.max_position_embeddings, width, dtype=dtype, device="meta"),
            "pooled": torch.empty(rows, second.projection_dim, dtype=dtype, device="meta"),
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        embeds = self.cast(text["prompt_embeds"])
        conditions = {"text_embeds": self.cast(text["pooled"]), "time_ids": self.cast(self.sizes(noisy, sizes))}
        output: Tensor = self.tower(
            self.cast(noisy), timesteps, encoder_hidden_states=embeds, added_cond_kwargs=conditions, return_dict=False
        )[0]
        return output

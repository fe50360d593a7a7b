"""Stable Diffusion 1.x and 2: a UNet conditioned on one CLIP text encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..family import Family, Sizes


class StableDiffusion(Family):
    """ε or v = UNet(x_t, t, text). Source: Rombach et al. 2022; diffusers `StableDiffusionPipeline`."""

    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
    needs = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    denoiser = "unet"

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width)."""
        self.check_length(prompts)
        embeds, _ = self.pipe.encode_prompt(prompts, self.text_device, 1, False)
        return {"prompt_embeds": embeds}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        text = self.pipe.text_encoder
        width, tokens = text.config.hidden_size, text.config.max_position_embeddings
        return {"prompt_embeds": torch.empty(rows, tokens, width, dtype=text.dtype, device="meta")}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output: Tensor = self.tower(
            self.cast(noisy), timesteps, encoder_hidden_states=self.cast(text["prompt_embeds"]), return_dict=False
        )[0]
        return output

"""FLUX.1: a flow transformer over packed 2×2 latents, T5 tokens and a pooled CLIP embedding."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..pipeline_resolution import PipelineResolution


class Flux(PipelineResolution, Family):
    """ε − x₀ = unpack(transformer(pack(x_σ), σ, guidance, text, pooled text, positions)).

    `guidance` is an input of the guidance-distilled models (`guidance_embeds` in the config), 3.5 in diffusers and kohya.
    Source: Black Forest Labs, flux; diffusers `FluxPipeline`.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    needs: ClassVar[tuple[str, ...]] = (
        "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler",
    )  # fmt: skip
    denoiser = "transformer"
    packing = 4

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, T5 tokens, width) and `pooled` (batch, CLIP width)."""
        self.check_length(prompts)
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, device=self.text_device, max_sequence_length=self.text_tokens)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        config, dtype = self.config, self.pipe.text_encoder.dtype
        return {
            "prompt_embeds": torch.empty(rows, self.text_tokens, config.joint_attention_dim, dtype=dtype, device="meta"),
            "pooled": torch.empty(rows, config.pooled_projection_dim, dtype=dtype, device="meta"),
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        height, width = noisy.shape[-2:]
        guidance = None
        if self.config.guidance_embeds:
            guidance = torch.full((len(noisy),), self.guidance, device=noisy.device, dtype=torch.float32)
        output = self.tower(
            hidden_states=pack(self.cast(noisy)),
            timestep=self.cast(timesteps) / 1000,
            guidance=guidance,
            pooled_projections=self.cast(text["pooled"]),
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            txt_ids=self.cast(torch.zeros(text["prompt_embeds"].shape[1], 3)),
            img_ids=self.cast(positions(height // 2, width // 2)),
            return_dict=False,
        )[0]
        return unpack(output, height, width)


def pack(latents: Tensor) -> Tensor:
    """(batch, c, 2h, 2w) → (batch, h·w, 4c): each token a 2×2 patch, channel-major (c, row, column)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of that height and width."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def positions(height: int, width: int) -> Tensor:
    """(height·width, 3): (0, row, column) of each token, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)

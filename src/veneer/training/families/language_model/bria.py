"""Bria 3: a flow transformer over packed 2×2 latents, conditioned on T5."""

from __future__ import annotations

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..flow.flux import pack, positions, unpack


class Bria(Family):
    """ε − x₀ = unpack(transformer(pack(x_σ), σ·1000, text, positions)).

    Text of an empty caption is zeros, as that of the pipeline without a negative prompt; padding is zeros too.
    Source: Bria 2025; diffusers `BriaPipeline`.
    """

    pipelines = ("BriaPipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packing = 4

    @property
    def resolution(self) -> int:
        """The pipeline's default: 64 patches of 2×2 latents."""
        return int(self.pipe.vae_scale_factor) * int(self.pipe.default_sample_size)

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width)."""
        self.check_length(prompts)
        embeds, *_ = self.pipe.encode_prompt(
            prompts, device=self.text_device, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        has_text = torch.tensor([bool(prompt) for prompt in prompts], device=embeds.device)
        return {"prompt_embeds": embeds * has_text[:, None, None]}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        shape = rows, self.text_tokens, self.config.joint_attention_dim
        return {"prompt_embeds": torch.empty(shape, dtype=next(self.tower.parameters()).dtype, device="meta")}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        (height, width), embeds = noisy.shape[-2:], self.cast(text["prompt_embeds"])
        output = self.tower(
            hidden_states=pack(self.cast(noisy)),
            timestep=timesteps,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=noisy.device),
            img_ids=self.cast(positions(height // 2, width // 2)),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

"""Sana: a flow transformer with linear attention over the latents of a deep-compression autoencoder, conditioned on Gemma 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..pipeline_resolution import call_default
from ..prompt_limits import LanguageModelLimits
from ..text_masks import mask_shapes


class Sana(LanguageModelLimits, Family):
    """ε − x₀ = transformer(x_σ, σ·1000·`timestep_scale`, text, text mask).

    A prompt is lower-cased and stripped, and follows the instruction that the pipeline has as its default; the empty prompt,
    which the pipeline takes for classifier-free guidance, has none. The autoencoder has no posterior: a latent is z·scale.
    Source: Xie et al. 2025; diffusers `SanaPipeline`.
    """

    pipelines = ("SanaPipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    density = "logit_normal"

    @property
    def instruction(self) -> list[str]:
        """The instruction before a prompt, `complex_human_instruction` of the pipeline, in lines."""
        return list(call_default(type(self.pipe), "complex_human_instruction"))

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width) and `mask` (batch, tokens), 1 for text and 0 for padding."""
        self.check_length(prompts)
        rows = [self._encode([prompt], self.instruction if prompt.strip() else None) for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _encode(self, prompts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            False,
            device=self.text_device,
            max_sequence_length=self.text_tokens,
            complex_human_instruction=instruction,
        )
        return {"prompt_embeds": embeds, "mask": mask}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        return mask_shapes(rows, self.text_tokens, self.config.caption_channels, self.pipe.text_encoder.dtype)

    def token_limit(self, tokenizer: Any) -> int:
        """Includes the instruction, without two tokens, as in the pipeline."""
        return len(tokenizer.encode("\n".join(self.instruction))) + self.text_tokens - 2

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        """The prompts in lower case, after the instruction; the empty prompt alone."""
        start = "\n".join(self.instruction)
        return [start + prompt.lower().strip() if prompt.strip() else "" for prompt in prompts]

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output: Tensor = self.tower(
            self.cast(noisy),
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            encoder_attention_mask=text["mask"].to(noisy.device),
            timestep=timesteps * self.config.timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]

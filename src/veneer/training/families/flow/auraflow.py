"""AuraFlow: a flow transformer over tokens of text and image, conditioned on Pile-T5."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..family import Family, Sizes
from ..pipeline_resolution import CallResolution
from ..text_masks import mask_shapes


class AuraFlow(CallResolution, Family):
    """ε − x₀ = transformer(x_σ, σ, text).

    Embeddings of padding tokens are zeros, and the transformer has no mask of the text.
    Source: fal 2024; diffusers `AuraFlowPipeline`.
    """

    pipelines = ("AuraFlowPipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"

    def token_limit(self, tokenizer: Any) -> int:
        return self.text_tokens

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width)."""
        self.check_length(prompts)
        embeds, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.text_device, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        shapes = mask_shapes(rows, self.text_tokens, self.config.joint_attention_dim, self.pipe.text_encoder.dtype)
        return {"prompt_embeds": shapes["prompt_embeds"]}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output: Tensor = self.tower(
            self.cast(noisy),
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            timestep=self.cast(timesteps / 1000),
            return_dict=False,
        )[0]
        return output

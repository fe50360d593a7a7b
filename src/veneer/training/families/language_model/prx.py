"""PRX: a flow transformer over latents that attends to the tokens of T5Gemma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..text_masks import mask_shapes

TOKENS = 256
"""Limit of text without a tokenizer."""


class Prx(Family):
    """ε − x₀ = transformer(x_σ, σ, text, text mask).

    Prompts are cleaned as the pipeline does: in lower case, without characters such as brackets and words such as `abc123`. It
    detaches the text from the text encoder. Images are generated in the size that is asked for.
    Source: Photoroom 2025; diffusers `PRXPipeline`.
    """

    pipelines = ("PRXPipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    single_prompt = True

    @property
    def resolution(self) -> int:
        """The pipeline's default, in pixels."""
        return int(self.pipe.default_sample_size)

    @property
    def text_tokens(self) -> int:
        tokenizer = self.pipe.tokenizer
        return self.max_tokens or (TOKENS if tokenizer is None else int(tokenizer.model_max_length))

    def token_limit(self, tokenizer: Any) -> int:
        return self.text_tokens

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        return [self.pipe.text_preprocessor.clean_text(prompt) for prompt in prompts]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width) and `mask` (batch, tokens), True for text."""
        self.check_length(prompts)
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(prompts), self.text_device, do_classifier_free_guidance=False, tokenizer_max_length=self.text_tokens
        )
        return {"prompt_embeds": embeds, "mask": mask}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        shapes = mask_shapes(rows, self.text_tokens, self.config.context_in_dim, self.pipe.text_encoder.dtype)
        return shapes | {"mask": shapes["mask"].to(torch.bool)}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output: Tensor = self.tower(
            hidden_states=self.cast(noisy),
            timestep=timesteps / self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            attention_mask=text["mask"].to(noisy.device),
            return_dict=False,
        )[0]
        return output

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        return arguments | {"use_resolution_binning": False}

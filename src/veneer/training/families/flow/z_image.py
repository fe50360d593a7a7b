"""Z-Image: a flow transformer over tokens of image and text, conditioned on a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..prompt_limits import LanguageModelLimits
from ..text_masks import mask_shapes, with_mask, without_mask


class ZImage(LanguageModelLimits, Family):
    """ε − x₀ = −transformer(x_σ, 1 − σ, text): the model predicts x₀ − ε, and its time is 0 for noise.

    Prompts are within the chat template of the tokenizer, as messages of a user; the text is the last but one hidden state.
    Source: Tongyi Lab 2025; diffusers `ZImagePipeline`, whose `guidance_scale` is one below that of other pipelines.
    """

    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"

    @property
    def multiple(self) -> int:
        """Pixels: the transformer takes 2×2 patches."""
        return 2 * self.vae_factor

    @property
    def resolution(self) -> int:
        """The pipeline's default, in pixels."""
        return 1024

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return [tokenizer.apply_chat_template(chat, **options) for chat in chats]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, longest prompt, width) and `mask` (batch, longest prompt), 1 for text and 0 for padding."""
        self.check_length(prompts)
        rows, _ = self.pipe.encode_prompt(
            list(prompts), self.text_device, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return with_mask(rows)

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        return mask_shapes(rows, self.text_tokens, self.config.cap_feat_dim, self.pipe.text_encoder.dtype)

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output = self.tower(
            list(self.cast(noisy).unsqueeze(2).unbind()),
            (1000 - timesteps) / 1000,
            [self.cast(row) for row in without_mask(text)],
            return_dict=False,
        )[0]
        return -torch.stack(list(output)).squeeze(2)

"""Qwen-Image: a flow transformer over packed 2×2 latents, conditioned on a vision-language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..pipeline_resolution import PipelineResolution
from ..prompt_limits import LanguageModelLimits
from ..text_masks import mask_shapes
from .flux import pack, unpack

TRUE_CFG_SCALE = 4.0
"""The pipeline's default, which it uses only with a negative prompt."""


class QwenImage(LanguageModelLimits, PipelineResolution, Family):
    """ε − x₀ = unpack(transformer(pack(x_σ), σ, text, text mask)).

    Prompts are within the pipeline's template, whose first tokens are dropped from the last hidden state.
    Source: Qwen team 2025; diffusers `QwenImagePipeline`. Guidance is `true_cfg_scale` with a negative prompt in the pipeline.
    """

    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packing = 4
    frames = True

    def token_limit(self, tokenizer: Any) -> int:
        """Includes the tokens that are dropped."""
        return self.text_tokens + int(self.pipe.prompt_template_encode_start_idx)

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        return [self.pipe.prompt_template_encode.format(prompt) for prompt in prompts]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, longest prompt, width) and `mask` (batch, longest prompt), 1 for text and 0 for padding."""
        self.check_length(prompts)
        embeds, mask = self.pipe.encode_prompt(list(prompts), self.text_device, max_sequence_length=self.text_tokens)
        ones = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        return {"prompt_embeds": embeds, "mask": ones if mask is None else mask}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        return mask_shapes(rows, self.text_tokens, self.config.joint_attention_dim, self.pipe.text_encoder.dtype)

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        height, width = noisy.shape[-2:]
        mask = text["mask"]
        output = self.tower(
            hidden_states=pack(self.cast(noisy)),
            timestep=self.cast(timesteps) / 1000,
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            encoder_hidden_states_mask=None if mask.is_meta or mask.all() else mask.to(noisy.device),
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        scale = arguments.pop("guidance_scale", TRUE_CFG_SCALE)
        if scale <= 1:  # the pipeline's default scale would apply to a negative prompt
            return {**{name: value for name, value in arguments.items() if name != "negative_prompt"}, "true_cfg_scale": scale}
        return arguments | {"true_cfg_scale": scale, "negative_prompt": arguments.get("negative_prompt") or [" "] * prompts}

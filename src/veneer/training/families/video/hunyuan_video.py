"""HunyuanVideo: a flow transformer over latents of videos, conditioned on a language model and a pooled CLIP embedding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..pipeline_resolution import CallResolution
from ..prompt_limits import LanguageModelLimits
from ..text_masks import mask_shapes


class HunyuanVideo(LanguageModelLimits, CallResolution, Family):
    """ε − x₀ = transformer(x_σ, σ·1000, 1000·guidance, text, text mask, pooled text), with an image as a video of one frame.

    Prompts are within the pipeline's template, whose first tokens are dropped from the last but two hidden state of Llama.
    Source: Kong et al. 2024; diffusers `HunyuanVideoPipeline`.
    """

    pipelines = ("HunyuanVideoPipeline",)
    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    denoiser = "transformer"
    frames = True

    @property
    def template(self) -> dict[str, Any]:
        """`template` with a place for the prompt, and `crop_start`, the number of its tokens that are dropped."""
        return dict(inspect.signature(self.pipe.encode_prompt).parameters["prompt_template"].default)

    def token_limit(self, tokenizer: Any) -> int:
        """That of Llama includes the tokens that are dropped."""
        if tokenizer is self.pipe.tokenizer_2:
            return int(tokenizer.model_max_length)
        return self.text_tokens + int(self.template["crop_start"])

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        if tokenizer is self.pipe.tokenizer_2:
            return prompts
        return [self.template["template"].format(prompt) for prompt in prompts]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width), `mask` (batch, tokens), and `pooled` (batch, CLIP width)."""
        self.check_length(prompts)
        embeds, pooled, mask = self.pipe.encode_prompt(prompts, device=self.text_device, max_sequence_length=self.text_tokens)
        return {"prompt_embeds": embeds, "mask": mask, "pooled": pooled}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        config, dtype = self.config, self.pipe.text_encoder_2.dtype
        shapes = mask_shapes(rows, self.text_tokens, config.text_embed_dim, self.pipe.text_encoder.dtype)
        return {**shapes, "pooled": torch.empty(rows, config.pooled_projection_dim, dtype=dtype, device="meta")}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output: Tensor = self.tower(
            hidden_states=self.with_frame(self.cast(noisy)),
            timestep=timesteps,
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            encoder_attention_mask=self.cast(text["mask"]),
            pooled_projections=self.cast(text["pooled"]),
            guidance=self.cast(torch.full((len(noisy),), self.guidance)) * 1000,
            return_dict=False,
        )[0]
        return output.squeeze(2)

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        return arguments | {"num_frames": 1, "output_type": "pil"}

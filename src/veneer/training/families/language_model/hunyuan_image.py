"""HunyuanImage 2.1: a flow transformer conditioned on a vision-language model, and on ByT5 for text in quotation marks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes, pad
from ..pipeline_resolution import PipelineResolution
from ..prompt_limits import LanguageModelLimits
from ..text_masks import mask_shapes


class HunyuanImage(LanguageModelLimits, PipelineResolution, Family):
    """ε − x₀ = transformer(x_σ, σ·1000, text, text mask, glyphs, mask of the glyphs), with 1000·guidance if it is an input.

    Prompts are within the pipeline's template, whose first tokens are dropped from the last but two hidden state. Glyphs are the
    text in quotation marks. Models with `use_meanflow` predict the mean velocity from a time to an earlier one; they train on
    the velocity itself, for which both times are equal.
    Source: Tencent 2025; diffusers `HunyuanImagePipeline`, whose classifier-free guidance is that of its guider.
    """

    pipelines = ("HunyuanImagePipeline",)
    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    denoiser = "transformer"

    @property
    def vae_factor(self) -> int:
        return int(self.pipe.vae.config.spatial_compression_ratio)

    @property
    def multiple(self) -> int:
        """Pixels: the VAE's factor times the first side of a patch."""
        return self.vae_factor * int(self.config.patch_size[0])

    @property
    def text_tokens(self) -> int:
        return self.fixed_tokens(int(self.pipe.tokenizer_max_length))

    def token_limit(self, tokenizer: Any) -> int:
        """That of the language model includes the tokens that are dropped."""
        if tokenizer is self.pipe.tokenizer_2:
            return int(self.pipe.tokenizer_2_max_length)
        return self.text_tokens + int(self.pipe.prompt_template_encode_start_idx)

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text

        if tokenizer is self.pipe.tokenizer_2:
            return [extract_glyph_text(prompt) or "" for prompt in prompts]
        return [self.pipe.prompt_template_encode.format(prompt) for prompt in prompts]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` and `mask` of the language model, `prompt_embeds_2` and `mask_2` of ByT5, zeros without glyphs."""
        self.check_length(prompts)
        embeds, mask, glyphs, glyph_mask = self.pipe.encode_prompt(list(prompts), self.text_device, batch_size=len(prompts))
        glyphs = glyphs.to(self.pipe.text_encoder_2.dtype)  # the pipeline's zeros are in float32
        return {"prompt_embeds": embeds, "mask": mask, "prompt_embeds_2": glyphs, "mask_2": glyph_mask}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        text, glyphs = self.pipe.text_encoder, self.pipe.text_encoder_2
        shapes = mask_shapes(rows, self.text_tokens, self.config.text_embed_dim, text.dtype)
        tokens, width = int(self.pipe.tokenizer_2_max_length), glyphs.config.d_model
        more = mask_shapes(rows, tokens, width, glyphs.dtype)
        return {**shapes, **{f"{name}_2": tensor for name, tensor in more.items()}}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        guidance = torch.full((len(noisy),), self.guidance) if self.config.guidance_embeds else None
        times = self.cast(timesteps)
        output: Tensor = self.tower(
            hidden_states=self.cast(noisy),
            timestep=times,
            timestep_r=times if self.config.use_meanflow else None,
            guidance=None if guidance is None else self.cast(guidance) * 1000,
            **self._text_inputs(text, noisy.device),
            return_dict=False,
        )[0]
        return output

    def _text_inputs(self, text: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Arguments of the transformer. On the meta device glyphs count as text, because masks have no values to sort by."""
        embeds, mask = self.cast(text["prompt_embeds"]), text["mask"].to(device)
        if mask.is_meta:
            tokens = mask.shape[1] + text["mask_2"].shape[1]
            return {"encoder_hidden_states": pad(embeds, tokens), "encoder_attention_mask": pad(mask, tokens)}
        return {
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": self.cast(text["prompt_embeds_2"]),
            "encoder_attention_mask_2": text["mask_2"].to(device),
        }

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        """`guidance_scale` is the input of guidance-distilled models; the guider of the pipeline has the scale of the others."""
        scale = arguments.get("guidance_scale")
        rest = {name: value for name, value in arguments.items() if name != "guidance_scale"}
        return rest if scale is None else rest | {"distilled_guidance_scale": scale}

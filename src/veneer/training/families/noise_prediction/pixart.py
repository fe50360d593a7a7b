"""PixArt-α and PixArt-Σ: a transformer conditioned on T5 that predicts ε and a variance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..family import Family, Sizes
from ..text_masks import mask_shapes


class PixArt(Family):
    """ε = first half of transformer(x_t, t, text, text mask, resolution and aspect ratio if the model is conditioned on them).

    Prompts are lower-cased and stripped, as the pipeline does without `clean_caption`. Its cleaner is not used: it removes a
    trigger token such as `<toy>` as an HTML tag, so generate with `clean_caption=False`.
    Source: Chen et al. 2023, 2024; diffusers `PixArtAlphaPipeline`, `PixArtSigmaPipeline`.
    """

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        return [prompt.lower().strip() for prompt in super().prepare(prompts, tokenizer)]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width) and `mask` (batch, tokens), 1 for text and 0 for padding."""
        self.check_length(prompts)
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts, False, device=self.text_device, clean_caption=False, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds, "mask": mask}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        return mask_shapes(rows, self.text_tokens, self.config.caption_channels, self.pipe.text_encoder.dtype)

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        conditions: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.has_size_conditions:
            target = self.sizes(noisy, sizes)[:, 4:]
            ratio = target[:, :1] / target[:, 1:]
            conditions = {"resolution": self.cast(target), "aspect_ratio": self.cast(ratio)}
        output: Tensor = self.tower(
            self.cast(noisy),
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            encoder_attention_mask=self.cast(text["mask"]),
            timestep=timesteps,
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]

    @property
    def has_size_conditions(self) -> bool:
        """True for the 1024-pixel α models, which are conditioned on resolution and aspect ratio."""
        declared = self.config.use_additional_conditions
        return bool(self.config.sample_size == 128 if declared is None else declared)

    def inputs(self, prompts: list[str]) -> dict[str, Any]:
        return {"prompt": prompts, "clean_caption": False}

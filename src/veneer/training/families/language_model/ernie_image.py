"""ERNIE-Image: a flow transformer over patches of FLUX.2's latents and the tokens of a language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..family import Family, Sizes
from ..flow.flux2 import normalize_patches
from ..pipeline_resolution import CallResolution
from ..prompt_limits import LanguageModelLimits
from ..text_masks import mask_shapes, with_mask

TOKENS = 512
"""Default limit of text: the pipeline has none but that of the tokenizer, and memory is predicted for the longest text."""
EPS = 1e-5
"""Of the batch norm, in the pipeline whatever the VAE's config says."""


class ErnieImage(LanguageModelLimits, CallResolution, Family):
    """ε − x₀ = transformer(x_σ in patches, σ·1000, text, lengths of the text).

    Text is the last but one hidden state of the language model. Images are generated from the prompt itself, without the
    pipeline's prompt enhancer, which paraphrases trigger tokens.
    Source: Baidu 2026; diffusers `ErnieImagePipeline`.
    """

    pipelines = ("ErnieImagePipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packing = 4

    @property
    def text_tokens(self) -> int:
        return self.max_tokens or TOKENS

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return normalize_patches(self.pipe.vae, *super().encode_images(pixels), EPS)

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, longest prompt, width) and `mask` (batch, longest prompt), 1 for text and 0 for padding."""
        self.check_length(prompts)
        rows = self.pipe.encode_prompt(list(prompts), self.text_device)
        return with_mask([row[: self.text_tokens] for row in rows])

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        return mask_shapes(rows, self.text_tokens, self.config.text_in_dim, self.pipe.text_encoder.dtype)

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output: Tensor = self.tower(
            hidden_states=pixel_unshuffle(self.cast(noisy), 2),
            timestep=self.cast(timesteps),
            text_bth=self.cast(text["prompt_embeds"]),
            text_lens=text["mask"].sum(dim=1).to(noisy.device),
            return_dict=False,
        )[0]
        return pixel_shuffle(output, 2)

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        return arguments | {"use_pe": False}

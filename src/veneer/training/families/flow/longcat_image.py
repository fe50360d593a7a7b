"""LongCat-Image: a flow transformer over packed 2×2 latents, conditioned on a vision-language model."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..pipeline_resolution import PipelineResolution
from ..prompt_limits import LanguageModelLimits
from .flux import pack, positions, unpack


class LongCatImage(LanguageModelLimits, PipelineResolution, Family):
    """ε − x₀ = unpack(transformer(pack(x_σ), σ, text, positions)).

    Text in quotation marks is one token per character. The positions of the image follow those of the text and its padding, so
    the length of the text is fixed. Images are generated from the prompt as it is, without the pipeline's rewriting of prompts,
    which paraphrases trigger tokens.
    Source: Meituan 2025; diffusers `LongCatImagePipeline`.
    """

    pipelines = ("LongCatImagePipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    packing = 4

    @property
    def text_tokens(self) -> int:
        return self.fixed_tokens(int(self.pipe.tokenizer_max_length))

    def _token_ids(self, prompts: list[str], tokenizer: Any) -> list[list[int]]:
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

        def parts(prompt: str) -> list[str]:
            return [*chain.from_iterable(part if quoted else [part] for part, quoted in split_quotation(prompt))]

        rows = [[tokenizer(part, add_special_tokens=False, verbose=False).input_ids for part in parts(p)] for p in prompts]
        return [[*chain.from_iterable(row)] for row in rows]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width); the pipeline detaches them from the text encoder."""
        self.check_length(prompts)
        embeds, _ = self.pipe.encode_prompt(list(prompts))
        return {"prompt_embeds": embeds}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        shape = rows, self.text_tokens, self.config.joint_attention_dim
        return {"prompt_embeds": torch.empty(shape, dtype=self.pipe.text_encoder.dtype, device="meta")}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        (height, width), embeds = noisy.shape[-2:], self.cast(text["prompt_embeds"])
        tokens = embeds.shape[1]
        order = torch.arange(tokens)
        output = self.tower(
            hidden_states=pack(self.cast(noisy)),
            timestep=self.cast(timesteps) / 1000,
            encoder_hidden_states=embeds,
            txt_ids=torch.stack([torch.zeros(tokens), order, order], dim=1).to(noisy.device),
            img_ids=(positions(height // 2, width // 2) + torch.tensor([1.0, tokens, tokens])).to(noisy.device),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        """One negative prompt for each prompt, which the pipeline's default of a single one is not."""
        return arguments | {"negative_prompt": arguments.get("negative_prompt") or [""] * prompts, "enable_prompt_rewrite": False}

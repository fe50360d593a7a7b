"""Kandinsky 5: a flow transformer over latents with their channels last, conditioned on a vision-language model and on CLIP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes
from ..pipeline_resolution import CallResolution
from ..prompt_limits import LanguageModelLimits, PromptLimits
from ..row_groups import predict_by_group
from ..text_masks import mask_shapes, text_lengths, with_mask


class Kandinsky5(LanguageModelLimits, CallResolution, Family):
    """ε − x₀ = transformer(x_σ, σ·1000, text, pooled CLIP), with an image as a video of one frame.

    Prompts are within the pipeline's template, whose first tokens are dropped from the last hidden state. The transformer has no
    mask of the text, so rows with the same number of tokens are one call, and an image is generated for one prompt at a time. A
    latent is z·scale: the pipeline does not use the shift of its VAE.
    Source: Kandinsky Lab 2025; diffusers `Kandinsky5T2IPipeline`.
    """

    pipelines = ("Kandinsky5T2IPipeline",)
    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    denoiser = "transformer"
    single_prompt = True

    @property
    def input_channels(self) -> int:
        """Those of models that continue given frames include the frames and a mask."""
        channels = int(self.config.in_visual_dim)
        return 2 * channels + 1 if self.config.visual_cond else channels

    @property
    def multiple(self) -> int:
        """Pixels: the VAE's factor times the second side of a patch."""
        return self.vae_factor * int(self.config.patch_size[1])

    def cast(self, tensor: Tensor) -> Tensor:
        """In the dtype of the layer that reads the latents: the embeddings of the time stay in float32."""
        weight = self.pipe.transformer.visual_embeddings.in_layer.weight
        return tensor.to(weight.device, weight.dtype)

    def _latent_affine(self) -> tuple[Tensor | float, Tensor | float]:
        return 0.0, float(self.pipe.vae.config.scaling_factor)

    def limits(self) -> Iterator[tuple[Any, int]]:
        """The limit of the language model includes the tokens that are dropped."""
        processor = self.pipe.tokenizer
        yield getattr(processor, "tokenizer", processor), self.text_tokens + int(self.pipe.prompt_template_encode_start_idx)
        yield self.pipe.tokenizer_2, int(self.pipe.tokenizer_2.model_max_length)

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        from diffusers.pipelines.kandinsky5.pipeline_kandinsky_t2i import prompt_clean

        prompts = [prompt_clean(prompt) for prompt in prompts]
        is_clip = tokenizer is self.pipe.tokenizer_2
        return prompts if is_clip else [self.pipe.prompt_template.format(prompt) for prompt in prompts]

    def text_beyond(self, ids: list[int], limit: int, tokenizer: Any) -> str:
        if tokenizer is self.pipe.tokenizer_2:
            return PromptLimits.text_beyond(self, ids, limit, tokenizer)
        return super().text_beyond(ids, limit, tokenizer)

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width), `mask` (batch, tokens), 1 for text, and `pooled` (batch, CLIP width)."""
        self.check_length(prompts)
        rows = [
            self.pipe.encode_prompt([prompt], max_sequence_length=self.text_tokens, device=self.text_device) for prompt in prompts
        ]
        return with_mask([embeds[0] for embeds, _, _ in rows]) | {"pooled": torch.cat([pooled for _, pooled, _ in rows])}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        dtype = self.pipe.text_encoder.dtype
        pooled = torch.empty(rows, self.config.in_text_dim2, dtype=dtype, device="meta")
        return mask_shapes(rows, self.text_tokens, self.config.in_text_dim, dtype) | {"pooled": pooled}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        inputs = noisy, timesteps, text["prompt_embeds"], text["pooled"]
        return predict_by_group(text_lengths(text["mask"]), self._predict, *(self.cast(each) for each in inputs))

    def _predict(self, length: int, noisy: Tensor, timesteps: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        """The prediction for rows with `length` tokens of text."""
        device, (_, *patch) = noisy.device, self.config.patch_size
        sides = [side // size for side, size in zip(noisy.shape[-2:], patch, strict=True)]
        output: Tensor = self.tower(
            hidden_states=noisy.permute(0, 2, 3, 1).unsqueeze(1),
            encoder_hidden_states=embeds[:, :length],
            timestep=timesteps,
            pooled_projections=pooled,
            visual_rope_pos=[torch.arange(side, device=device) for side in (1, *sides)],
            text_rope_pos=torch.arange(length, device=device),
            return_dict=False,
        )
        return output.squeeze(1).permute(0, 3, 1, 2)

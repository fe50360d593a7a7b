"""HunyuanDiT: a transformer conditioned on BERT, T5 and image sizes that predicts ε or v, and a variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes

SIZE = 1024.0
"""Original height and width of images in the pipeline, whatever their size."""
BASE = 512 // 8
"""Side in latents of the square whose positions those of other sizes are interpolated to."""


class HunyuanDiT(Family):
    """ε or v = first half of transformer(x_t, t, both texts and masks, sizes, style 0, rotary positions).

    The transformer has learned embeddings for padding tokens, so the lengths of both texts are fixed.
    Source: Li et al. 2024; diffusers `HunyuanDiTPipeline`. Images are generated in the size that is asked for, without the
    pipeline's mapping to its standard sizes.
    """

    pipelines = ("HunyuanDiTPipeline",)
    needs = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    denoiser = "transformer"

    @property
    def text_tokens(self) -> int:
        return self.fixed_tokens(int(self.config.text_len_t5))

    def token_limit(self, tokenizer: Any) -> int:
        return self.text_tokens if tokenizer is self.pipe.tokenizer_2 else int(self.config.text_len)

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` and `mask` of BERT, `prompt_embeds_t5` and `mask_t5` of T5: (batch, tokens, width), (batch, tokens)."""
        self.check_length(prompts)
        text: dict[str, Tensor] = {}
        for index, (suffix, tokens) in enumerate((("", int(self.config.text_len)), ("_t5", self.text_tokens))):
            embeds, _, mask, _ = self.pipe.encode_prompt(
                prompts,
                device=self.text_device,
                do_classifier_free_guidance=False,
                max_sequence_length=tokens,
                text_encoder_index=index,
            )
            text |= {f"prompt_embeds{suffix}": embeds, f"mask{suffix}": mask}
        return text

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        config, dtype = self.config, self.pipe.text_encoder_2.dtype
        shapes: dict[str, Tensor] = {}
        for suffix, tokens, width in (
            ("", config.text_len, config.cross_attention_dim),
            ("_t5", self.text_tokens, config.cross_attention_dim_t5),
        ):
            shapes[f"prompt_embeds{suffix}"] = torch.empty(rows, tokens, width, dtype=dtype, device="meta")
            shapes[f"mask{suffix}"] = torch.empty(rows, tokens, dtype=torch.int64, device="meta")
        return shapes

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        noisy = self.cast(noisy)
        output: Tensor = self.tower(
            noisy,
            self.cast(timesteps),
            encoder_hidden_states=self.cast(text["prompt_embeds"]),
            text_embedding_mask=text["mask"].to(noisy.device),
            encoder_hidden_states_t5=self.cast(text["prompt_embeds_t5"]),
            text_embedding_mask_t5=text["mask_t5"].to(noisy.device),
            image_meta_size=self.cast(self.meta_sizes(noisy, sizes)),
            style=torch.zeros(len(noisy), dtype=torch.int64, device=noisy.device),
            image_rotary_emb=self.rotary(noisy),
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]

    def meta_sizes(self, noisy: Tensor, sizes: Sizes | None) -> Tensor:
        """(batch, 6): original size, target size and crop; without `sizes` the original is that of the pipeline, 1024×1024."""
        original, crop, target = self.sizes(noisy, sizes).split(2, dim=1)
        return torch.cat([torch.full_like(original, SIZE) if sizes is None else original, target, crop], dim=1)

    def rotary(self, noisy: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of each patch, (patches, width of a head)."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        patch, width = int(self.config.patch_size), int(self.config.attention_head_dim)
        grid = noisy.shape[-2] // patch, noisy.shape[-1] // patch
        region = get_resize_crop_region_for_grid(grid, BASE // patch)
        cos, sin = get_2d_rotary_pos_embed(width, region, grid, device=noisy.device, output_type="pt")
        return cos, sin

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        return arguments | {"use_resolution_binning": False}

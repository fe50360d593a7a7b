"""HiDream-I1: a flow transformer with mixtures of experts, conditioned on T5, on the layers of Llama and on two CLIPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.injection.errors import OptionError

from ..family import Family, Sizes
from ..pipeline_resolution import PipelineResolution

CLIP_TOKENS = 218
"""The most tokens that the pipeline passes to its CLIPs."""


class HiDream(PipelineResolution, Family):
    """ε − x₀ = −transformer(x_σ, σ·1000, T5, layers of Llama, pooled CLIP): the model predicts x₀ − ε.

    Text is padded to the limit without a mask in the transformer. Images are generated in the area that the pipeline trains at,
    with the aspect ratio that is asked for.
    Source: HiDream.ai 2025; diffusers `HiDreamImagePipeline` and `train_dreambooth_lora_hidream.py`.
    """

    pipelines = ("HiDreamImagePipeline",)
    needs = (
        "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "tokenizer", "tokenizer_2", "tokenizer_3",
        "tokenizer_4", "transformer", "scheduler",
    )  # fmt: skip
    denoiser = "transformer"

    def token_limit(self, tokenizer: Any) -> int:
        is_clip = tokenizer in (self.pipe.tokenizer, self.pipe.tokenizer_2)
        return min(self.text_tokens, CLIP_TOKENS if is_clip else int(tokenizer.model_max_length))

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Family.encode_images`.

        Raises:
            OptionError: sides that are not divisible, or more patches than the transformer pads an image to that is no square.
        """
        height, width = pixels.shape[-2:]
        (rows, columns), patch = self.config.max_resolution, int(self.config.patch_size)
        limit, patches = rows * columns // patch**2, (height // self.multiple) * (width // self.multiple)
        if height != width and patches > limit:
            message = (
                f"HiDream takes images of at most {limit} patches unless they are squares, got {patches} of an image of "
                f"{height} x {width} pixels; use a resolution of at most {int(limit**0.5) * self.multiple}, or square images."
            )
            raise OptionError(message, option="resolution", given=patches, expected=limit)
        return super().encode_images(pixels)

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width), `llama` (batch, layers, tokens, width) and `pooled` (batch, width)."""
        self.check_length(prompts)
        embeds, _, llama, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.text_device, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds, "llama": llama.transpose(0, 1), "pooled": pooled}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        (t5, width), pipe = self.config.caption_channels, self.pipe
        layers = pipe.text_encoder_4.config.num_hidden_layers
        return {
            "prompt_embeds": torch.empty(rows, self.text_tokens, t5, dtype=pipe.text_encoder_3.dtype, device="meta"),
            "llama": torch.empty(rows, layers, self.text_tokens, width, dtype=pipe.text_encoder_4.dtype, device="meta"),
            "pooled": torch.empty(rows, self.config.text_emb_dim, dtype=pipe.text_encoder.dtype, device="meta"),
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        output: Tensor = self.tower(
            hidden_states=self.cast(noisy),
            timesteps=timesteps,
            encoder_hidden_states_t5=self.cast(text["prompt_embeds"]),
            encoder_hidden_states_llama3=self.cast(text["llama"]).transpose(0, 1),
            pooled_embeds=self.cast(text["pooled"]),
            return_dict=False,
        )[0]
        if self.tower.training and not self.config.force_inference_output:
            output = self._image(output, noisy.shape[-2], noisy.shape[-1])
        return -output

    def _image(self, patches: Tensor, height: int, width: int) -> Tensor:
        """(batch, channels, tokens, patch²), as in training mode and padded if it is no square, → (batch, channels, h, w)."""
        side = int(self.config.patch_size)
        rows, columns = height // side, width // side
        tiles = patches[:, :, : rows * columns].unflatten(3, (side, side)).unflatten(2, (rows, columns))
        return tiles.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)

"""CogView4: a flow transformer over tokens of text and image, conditioned on a language model and on image sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...objective.objectives import Flow, Objective, ObjectiveOptions
from ..family import Family, Sizes
from ..prompt_limits import LanguageModelLimits
from ..row_groups import predict_by_group
from ..text_masks import mask_shapes

MULTIPLE = 16
"""The pipeline pads text on the left to a multiple of this, without a mask."""


def dynamic_shift(config: Any, tokens: int) -> float:
    """k of σ′ = kσ/(1 + (k − 1)σ) by resolution: μ = `max_shift`·√(tokens/256) + `base_shift`, or e^μ.

    Args:
        config: of the scheduler. Its `time_shift_type` of `linear` is k = μ.
        tokens: number of patches of the image.
    """
    from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

    keys = {"base_image_seq_len": 256, "base_shift": 0.25, "max_shift": 0.75}
    mu = float(calculate_shift(tokens, *(config.get(key, default) for key, default in keys.items())))
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


class SquareRootShift(Flow):
    """Flow whose `flux_shift` is `dynamic_shift`, as in the pipeline.

    Attributes:
        config: of the scheduler.
    """

    config: Any

    def log_shift(self, tokens: int) -> float:
        return math.log(dynamic_shift(self.config, tokens))


class CogView4(LanguageModelLimits, Family):
    """ε − x₀ = transformer(x_σ, t, text, original size, target size, crop), where σ is t/1000 after the scheduler's shift.

    Text is the last but one hidden state of GLM, with its padding on the left to a multiple of 16 tokens, which the transformer
    reads without a mask: rows of different lengths are separate passes.
    Source: Zheng et al. 2024 (CogView3), Z.ai 2025; diffusers `CogView4Pipeline` and `train_control_cogview4.py`.
    """

    pipelines = ("CogView4Pipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"

    def objective(self, options: ObjectiveOptions | None = None) -> Objective:
        objective = super().objective(options)
        if isinstance(objective, Flow):
            objective = SquareRootShift(objective.options, objective.steps, objective.shift)
            objective.config = self.pipe.scheduler.config
        return objective

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width) and `mask` (batch, tokens): ones, and zeros where batches are joined."""
        self.check_length(prompts)
        embeds, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.text_device, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds, "mask": torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        tokens = math.ceil(self.text_tokens / MULTIPLE) * MULTIPLE
        return mask_shapes(rows, tokens, self.config.text_embed_dim, self.pipe.text_encoder.dtype)

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        mask = text["mask"]
        lengths = [mask.shape[1]] * len(mask) if mask.is_meta else mask.sum(dim=1).tolist()
        inputs = (
            self.cast(noisy),
            self.times(timesteps, noisy),
            self.cast(text["prompt_embeds"]),
            self.cast(self.sizes(noisy, sizes)),
        )
        return predict_by_group(lengths, self._predict, *inputs)

    def times(self, timesteps: Tensor, noisy: Tensor) -> Tensor:
        """The time input for noise levels σ·1000: 1000·σ/(σ + k(1 − σ)), the pipeline's schedule before the shift k."""
        config, patch = self.pipe.scheduler.config, int(self.config.patch_size)
        tokens = noisy.shape[-2] * noisy.shape[-1] // patch**2
        shift = dynamic_shift(config, tokens) if config.get("use_dynamic_shifting") else float(config.get("shift") or 1.0)
        steps = config.num_train_timesteps
        return timesteps / (timesteps / steps * (1 - shift) + shift)

    def _predict(self, tokens: int, noisy: Tensor, timesteps: Tensor, embeds: Tensor, sizes: Tensor) -> Tensor:
        """The prediction for rows with text of that many tokens. `sizes`: (batch, 6)."""
        original, crop, target = sizes.split(2, dim=1)
        output: Tensor = self.tower(
            hidden_states=noisy,
            encoder_hidden_states=embeds[:, :tokens],
            timestep=timesteps,
            original_size=original,
            target_size=target,
            crop_coords=crop,
            return_dict=False,
        )[0]
        return output

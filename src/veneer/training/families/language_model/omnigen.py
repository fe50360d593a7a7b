"""OmniGen: a language model that reads the tokens of text, the time and the patches of latents as one sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...objective.objectives import Objective, ObjectiveOptions
from ..family import Family, Sizes
from ..pipeline_resolution import PipelineResolution
from ..prompt_limits import WholeTemplateLimits
from ..row_groups import predict_by_group
from ..text_masks import text_lengths

TOKENS = 512
"""Default limit of text: the pipeline has none, and memory is predicted for the longest text."""
STEPS = 1000
"""Number of training timesteps, of which the noise level is at least one; the scheduler's is 1, because its time ends at 1."""


class OmniGen(WholeTemplateLimits, PipelineResolution, Family):
    """ε − x₀ = −transformer(x_σ, 1 − σ, token ids): the model predicts x₀ − ε, and its time is 0 for noise.

    There is no text encoder: the transformer embeds the tokens of the pipeline's template with the prompt, with causal attention.
    Its positions are those of the first row of a batch, so rows with the same number of tokens are one call, and an image is
    generated for one prompt at a time.
    Source: Xiao et al. 2024; their `loss.py`, with logit-normal noise levels; diffusers `OmniGenPipeline`.
    """

    pipelines = ("OmniGenPipeline",)
    needs = ("vae", "tokenizer", "transformer", "scheduler")
    denoiser = "transformer"
    density = "logit_normal"
    single_prompt = True

    def objective(self, options: ObjectiveOptions | None = None) -> Objective:
        objective = super().objective(options)
        objective.steps = STEPS
        return objective

    @property
    def text_tokens(self) -> int:
        return self.max_tokens or TOKENS

    def limits(self) -> Iterator[tuple[Any, int]]:
        yield self.pipe.tokenizer, self.text_tokens

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        return [self.pipe.multimodal_processor.add_prefix_instruction(prompt) for prompt in prompts]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`input_ids` and `mask` (batch, longest prompt), int64; the mask is 1 for text."""
        rows = [torch.tensor(ids) for ids in self._token_ids(self.within_limits(prompts), self.pipe.tokenizer)]
        masks = [torch.ones_like(row) for row in rows]
        return {"input_ids": pad_sequence(rows, batch_first=True), "mask": pad_sequence(masks, batch_first=True)}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        return {name: torch.empty(rows, self.text_tokens, dtype=torch.int64, device="meta") for name in ("input_ids", "mask")}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        times = 1 - timesteps / STEPS
        return -predict_by_group(
            text_lengths(text["mask"]), self._predict, self.cast(noisy), times, text["input_ids"].to(noisy.device)
        )

    def _predict(self, length: int, noisy: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        """The transformer's prediction for rows with `length` tokens of text, which the time and the image follow."""
        rows, patch = len(noisy), int(self.config.patch_size)
        tokens = length + 1 + noisy.shape[-2] // patch * (noisy.shape[-1] // patch)
        mask = torch.ones(tokens, tokens, dtype=noisy.dtype, device=noisy.device).tril()
        mask[length + 1 :] = 1
        output: Tensor = self.tower(
            hidden_states=noisy,
            timestep=times,
            input_ids=ids[:, :length],
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=mask.expand(rows, -1, -1),
            position_ids=torch.arange(tokens, device=noisy.device).expand(rows, -1),
            return_dict=False,
        )[0]
        return output

"""Chroma: FLUX.1 without a pooled text embedding and guidance, and with a mask of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..family import Sizes
from .flux import Flux, pack, positions, unpack


class Chroma(Flux):
    """ε − x₀ = unpack(transformer(pack(x_σ), σ, text, text mask, positions)).

    The mask is 1 for the tokens of the prompt and the first padding token. diffusers adds it to the attention scores, so that
    the other padding weighs e times less instead of nothing; training does the same, as images are generated with it.
    Source: Lodestone Rock, Chroma; diffusers `ChromaPipeline`.
    """

    pipelines = ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, width) and `mask` (batch, tokens), in the dtype of the text encoder."""
        self.check_length(prompts)
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            prompts, device=self.text_device, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds, "mask": mask}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        width, dtype = self.config.joint_attention_dim, self.pipe.text_encoder.dtype
        return {
            "prompt_embeds": torch.empty(rows, self.text_tokens, width, dtype=dtype, device="meta"),
            "mask": torch.empty(rows, self.text_tokens, dtype=dtype, device="meta"),
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens, mask = pack(self.cast(noisy)), self.cast(text["mask"])
        mask = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        with masked_checkpoints(self.tower, mask):
            output = self.tower(
                hidden_states=tokens,
                timestep=self.cast(timesteps) / 1000,
                encoder_hidden_states=self.cast(text["prompt_embeds"]),
                txt_ids=self.cast(torch.zeros(text["prompt_embeds"].shape[1], 3)),
                img_ids=self.cast(positions(height // 2, width // 2)),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return unpack(output, height, width)


@contextmanager
def masked_checkpoints(tower: Any, mask: Tensor) -> Iterator[None]:
    """Context in which gradient checkpointing passes the mask to the single-stream blocks, which diffusers leaves out."""
    original: Callable[..., Any] | None = vars(tower).get("_gradient_checkpointing_func")
    if original is None:
        yield
        return
    single = set(tower.single_transformer_blocks)

    def checkpoint(block: Any, *inputs: Any) -> Any:
        return original(partial(block, attention_mask=mask) if block in single else block, *inputs)

    tower._gradient_checkpointing_func = checkpoint
    try:
        yield
    finally:
        tower._gradient_checkpointing_func = original

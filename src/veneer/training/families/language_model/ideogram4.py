"""Ideogram 4: a flow transformer over one sequence of text and normalized 2×2 patches of FLUX.2's latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import Family, Sizes, pad
from ..flow.flux2 import normalize_patches
from ..pipeline_resolution import CallResolution, call_default
from ..prompt_limits import WholeTemplateLimits
from ..text_masks import mask_shapes, text_lengths, with_mask


class Ideogram4(WholeTemplateLimits, CallResolution, Family):
    """ε − x₀ = −transformer(text then x_σ in patches, 1 − σ): the model predicts x₀ − ε, and its time is 0 for noise.

    Text is what 13 layers of the language model return for the prompt in the chat template, one after the other in each token.
    Classifier-free guidance has a transformer for the unconditional branch, which does not train.
    Source: Ideogram 2026; diffusers `Ideogram4Pipeline`.
    """

    pipelines = ("Ideogram4Pipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "unconditional_transformer", "scheduler")
    denoiser = "transformer"
    packing = 4

    @property
    def text_tokens(self) -> int:
        """`max_tokens`, or the default of the pipeline."""
        return self.max_tokens or int(call_default(type(self.pipe), "max_sequence_length"))

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        chats = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
        return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        return normalize_patches(vae, *super().encode_images(pixels), float(vae.config.batch_norm_eps), places_first=True)

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, longest prompt, layers·width), float32, and `mask` (batch, longest prompt), 1 for text."""
        prompts = self.within_limits(prompts)
        lengths = [len(ids) for ids in self._token_ids(prompts, self.pipe.tokenizer)]
        longest = max(lengths)
        embeds, *_ = self.pipe.encode_prompt(prompts, 1, 1, longest, self.text_device)
        return with_mask([row[longest - length : longest] for row, length in zip(embeds, lengths, strict=True)])

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        return mask_shapes(rows, self.text_tokens, self.config.llm_features_dim, torch.float32)

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        (height, width), tokens = (side // 2 for side in noisy.shape[-2:]), text["mask"].shape[1]
        lengths, device = text_lengths(text["mask"]), noisy.device
        positions, segments, roles = self.pipe._prepare_ids(lengths, height, width, tokens, device)
        rows = zip(self.cast(text["prompt_embeds"]), lengths, strict=True)
        embeds = torch.stack([row.roll(tokens - length, 0) for row, length in rows])  # padding comes before the text
        patches = pack_places_first(self.cast(noisy))
        output: Tensor = self.tower(
            hidden_states=torch.cat([patches.new_zeros(len(noisy), tokens, patches.shape[-1]), patches], dim=1),
            timestep=self.cast(1 - timesteps / self.pipe.scheduler.config.num_train_timesteps),
            encoder_hidden_states=pad(embeds, tokens + height * width),
            position_ids=positions,
            segment_ids=segments,
            indicator=roles,
            return_dict=False,
        )[0]
        return -unpack_places_first(output[:, tokens:], height, width)

    @classmethod
    def sampling_arguments(cls, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
        """A `guidance_scale` for all steps, or the end of the pipeline's schedule of scales for a number of steps."""
        if arguments.get("guidance_scale") is not None:
            return arguments | {"guidance_schedule": None}
        from diffusers import Ideogram4Pipeline

        scales = call_default(Ideogram4Pipeline, "guidance_schedule")
        steps = int(arguments.get("num_inference_steps") or call_default(Ideogram4Pipeline, "num_inference_steps"))
        return arguments | {"guidance_schedule": (scales[0],) * (steps - len(scales)) + scales[-steps:]}


def pack_places_first(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) → (batch, patches, 4·channels), ordered by row, column and channel in a 2×2 patch."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3, 5).flatten(1, 2)


def unpack_places_first(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_places_first` for `height` × `width` patches."""
    patches = tokens.unflatten(1, (height, width)).unflatten(3, (2, 2, -1))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

"""DiT: a transformer conditioned on a class label instead of text."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from veneer.injection.errors import OptionError

from ..family import Family, Sizes


class DiT(Family):
    """ε = first half of transformer(x_t, t, class). Source: Peebles & Xie 2023; diffusers `DiTPipeline`.

    A prompt is a class: its name (`pipe.labels`), its number in digits, or "" for the unconditional class.
    """

    pipelines = ("DiTPipeline",)
    needs = ("vae", "transformer", "scheduler")
    denoiser = "transformer"
    square = True

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`class_labels` (batch,), int64.

        Raises:
            OptionError: an unknown class name or number.
        """
        return {"class_labels": torch.tensor([self.label(prompt) for prompt in prompts])}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        return {"class_labels": torch.empty(rows, dtype=torch.int64, device="meta")}

    def label(self, prompt: str) -> int:
        """The number of a class; the one after the last is the unconditional class."""
        classes = int(self.config.num_embeds_ada_norm)
        word = prompt.strip()
        if not word:
            return classes
        if word.isdecimal() and int(word) <= classes:
            return int(word)
        if word in self.pipe.labels:
            return int(self.pipe.labels[word])
        near = get_close_matches(word, self.pipe.labels, n=3, cutoff=0.4) or list(self.pipe.labels)[:5]
        hint = f" Similar names: {', '.join(near)}." if near else ""
        message = f"the base model has no class {word!r}; expected a class name or a number from 0 to {classes - 1}.{hint}"
        raise OptionError(message, option="prompt", given=word, expected=tuple(near))

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        """Raises OptionError for latents that are not square, which the transformer does not support."""
        if noisy.shape[-2] != noisy.shape[-1]:
            given = tuple(noisy.shape[-2:])
            raise OptionError(f"DiT takes square images only, got latents of {given[0]}×{given[1]}", option="noisy", given=given)
        output: Tensor = self.tower(
            self.cast(noisy), timestep=timesteps, class_labels=text["class_labels"].to(noisy.device), return_dict=False
        )[0]
        return output[:, : noisy.shape[1]]

    def inputs(self, prompts: list[str]) -> dict[str, Any]:
        return {"class_labels": [self.label(prompt) for prompt in prompts]}

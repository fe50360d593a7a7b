"""The loss of a base that is given, for every training picture, what it is to follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from veneer.injection import Attachment
from veneer.training.data.dataset import Example
from veneer.training.data.latent_cache import Memory
from veneer.training.loop.seeds import generator
from veneer.training.objective.denoising_loss import DenoisingLoss

from .image_embedding import Embedder
from .maps.maps import Condition


class Follow(Protocol):
    """What is given for some training pictures, by the names that the method takes."""

    def __call__(self, step: int, examples: Sequence[Example]) -> Mapping[str, Any]: ...


@dataclass
class ControlLoss(DenoisingLoss):
    """`DenoisingLoss` inside the scope of what is given.

    Args:
        control: the attachment that is trained. `follow`: what it is given.
    """

    control: Attachment | None = None
    follow: Follow | None = None

    def losses(self, step: int, examples: Sequence[Example]) -> Tensor:
        """Loss of each example, (batch,)."""
        assert self.control is not None
        assert self.follow is not None
        with self.control.condition(**self.follow(step, examples), pipeline=self.family.tower):
            return super().losses(step, examples)


class FollowMaps:
    """`image`: the map of each picture as it is cropped and mirrored, or the one that someone made, cropped alike.

    Args:
        condition: computes maps where examples bring none. `memory`: bytes of maps to keep.
    """

    def __init__(self, condition: Condition, memory: int = 2**28) -> None:
        self.condition = condition
        self._memory: Memory[Tensor] = Memory(memory)

    def __call__(self, step: int, examples: Sequence[Example]) -> Mapping[str, Any]:
        """The maps, (batch, 3, height, width) in 0 … 1."""
        return {"image": torch.stack([self.map(example) for example in examples])}

    def map(self, example: Example) -> Tensor:
        """(3, height, width) in 0 … 1."""
        if example.guide is not None:
            return example.guide
        found = self._memory.get(example.key)
        if found is None:
            picture = to_pil_image((example.pixels + 1) / 2)
            found = pil_to_tensor(self.condition(picture))
            self._memory.put(example.key, found, found.numel())
        return found.float() / 255


class FollowPictures:
    """`embeds`: of each picture by the encoder; zeros for a share of them, which is what guidance goes away from.

    Args:
        embedder: of pictures. `dropout`: that share. `seed`: of its draws.
    """

    def __init__(self, embedder: Embedder, dropout: float, seed: int, memory: int = 2**28) -> None:
        self.embedder, self.dropout, self.seed = embedder, dropout, seed
        self._memory: Memory[Tensor] = Memory(memory)

    def __call__(self, step: int, examples: Sequence[Example]) -> Mapping[str, Any]:
        """The embeddings, (batch, …)."""
        return {"embeds": torch.stack([self._embedding(step, example) for example in examples])}

    def _embedding(self, step: int, example: Example) -> Tensor:
        found = self._memory.get(example.key)
        if found is None:
            found = self.embedder([to_pil_image((example.pixels + 1) / 2)])[0]
            self._memory.put(example.key, found, found.numel() * found.element_size())
        dropped = torch.rand((), generator=generator(self.seed, "no picture", step, example.index)) < self.dropout
        return torch.zeros_like(found) if dropped else found

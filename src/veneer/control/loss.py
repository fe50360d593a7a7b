"""Diffusion loss with a condition for every training image."""

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


class ConditionInput(Protocol):
    """Condition inputs of training examples, by the argument names of the method."""

    def __call__(self, step: int, examples: Sequence[Example]) -> Mapping[str, Any]: ...


@dataclass
class ControlLoss(DenoisingLoss):
    """`DenoisingLoss` with the conditions of the examples.

    Args:
        control: the attachment that is trained. `follow`: computes its condition inputs, such as the control map.
    """

    control: Attachment | None = None
    follow: ConditionInput | None = None

    def losses(self, step: int, examples: Sequence[Example], timesteps: Tensor | None = None) -> Tensor:
        """Loss of each example, (batch,)."""
        assert self.control is not None
        assert self.follow is not None
        with self.control.condition(**self.follow(step, examples), pipeline=self.family.tower):
            return super().losses(step, examples, timesteps)


class MapInput:
    """Condition input `image`: the map computed from each cropped image, or its map file, cropped in the same way.

    Args:
        condition: computes maps of examples without map files. `memory`: size of the in-memory cache of maps, in bytes.
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
        pixels = self._memory.get(example.key)
        if pixels is None:
            image = to_pil_image((example.pixels + 1) / 2)
            pixels = pil_to_tensor(self.condition(image))
            self._memory.put(example.key, pixels, pixels.numel())
        return pixels.float() / 255


class ImageEmbeddingInput:
    """Condition input `embeds`: image embeddings, replaced by zeros with a probability, for classifier-free guidance.

    Args:
        embedder: image encoder. `dropout`: probability of zeros. `seed`: random seed of the dropout. `memory`: size of the
            in-memory cache of embeddings, in bytes.
    """

    def __init__(self, embedder: Embedder, dropout: float, seed: int, memory: int = 2**28) -> None:
        self.embedder, self.dropout, self.seed = embedder, dropout, seed
        self._memory: Memory[Tensor] = Memory(memory)

    def __call__(self, step: int, examples: Sequence[Example]) -> Mapping[str, Any]:
        """The embeddings, (batch, …)."""
        return {"embeds": torch.stack([self._embedding(step, example) for example in examples])}

    def _embedding(self, step: int, example: Example) -> Tensor:
        embedding = self._memory.get(example.key)
        if embedding is None:
            embedding = self.embedder([to_pil_image((example.pixels + 1) / 2)])[0]
            self._memory.put(example.key, embedding, embedding.numel() * embedding.element_size())
        dropped = torch.rand((), generator=generator(self.seed, "no picture", step, example.index)) < self.dropout
        return torch.zeros_like(embedding) if dropped else embedding

"""mixup and CutMix: each training image is mixed with another one of its step, and the loss with both labels.

    mixup    x = λ x_i + (1 − λ) x_j                       λ ~ Beta(α, α)
    CutMix   x = x_i with a box of x_j, of area 1 − λ      λ ~ Beta(α, α), then 1 − the area inside the image
    loss     λ CE(f(x), y_i) + (1 − λ) CE(f(x), y_j)

Source: Zhang et al., mixup, ICLR 2018, equation 1; Yun et al., CutMix, ICCV 2019, equation 1. Deviation: λ is sampled for each
pair of images, there once for a batch. With both, each pair gets one of them with probability 1/2, as in timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from veneer.training.loop.seeds import mix


@dataclass(frozen=True)
class Mixing:
    """mixup and CutMix with random numbers that are a function of seed, step and image.

    Args:
        mixup, cutmix: α of the Beta distribution of each, such as 0.2 and 1; 0 disables it.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    seed: int = 0

    @property
    def enabled(self) -> bool:
        """True if images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @staticmethod
    def partner(row: int, samples: int) -> int:
        """The sample of the step that sample `row` is mixed with: its neighbor, or itself at the end of an odd number."""
        return row ^ 1 if row ^ 1 < samples else row

    def __call__(self, images: Tensor, others: Tensor, step: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mixes images with others.

        Args:
            images, others: (B, channels, height, width). `rows`: their samples in the step, which choose the random numbers.
        Returns:
            The mixed images, and λ of each, (B,).
        """
        mixed, weights = images.clone(), torch.empty(len(rows))
        for place, row in enumerate(rows):
            random = numpy.random.default_rng(mix(self.seed, "mixing", step, row // 2))
            cuts = self.cutmix > 0 and (self.mixup == 0 or random.random() < 0.5)
            alpha = self.cutmix if cuts else self.mixup
            weight = random.beta(alpha, alpha)
            if cuts:
                top, bottom, left, right = _box(weight, images.shape[-2], images.shape[-1], random)
                mixed[place, :, top:bottom, left:right] = others[place, :, top:bottom, left:right]
                weight = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
            else:
                mixed[place] = weight * images[place] + (1 - weight) * others[place]
            weights[place] = weight
        return mixed, weights.to(images.device)


def _box(weight: float, height: int, width: int, random: numpy.random.Generator) -> tuple[int, int, int, int]:
    """A box with a uniform center and a share 1 − λ of the area, cut off at the border: top, bottom, left, right."""
    side = (1 - weight) ** 0.5
    y, x = int(random.integers(height)), int(random.integers(width))
    half_height, half_width = int(side * height) // 2, int(side * width) // 2
    return max(0, y - half_height), min(height, y + half_height), max(0, x - half_width), min(width, x + half_width)

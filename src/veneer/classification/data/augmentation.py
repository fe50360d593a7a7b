"""RandAugment and random erasing that sample from an explicit generator, for use in threads.

torchvision's and timm's versions sample from the global generators, which concurrent threads and dropout would share.
"""

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

_Fill = Sequence[float]
_Operation = Callable[[Image.Image, float, list[float]], Image.Image]


def uniform(rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """A uniform sample from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def rand_augment(
    image: Image.Image, rng: torch.Generator, *, operations: int = 2, strength: float = 0.3, fill: Sequence[float] = (0, 0, 0)
) -> Image.Image:
    """Applies `operations` operations in sequence, each sampled uniformly from `OPERATIONS`, all of the same strength.

    Args:
        strength: 0 (no change) to 1; the paper's magnitude divided by 30.
        fill: RGB, 0 to 255, of areas outside the image.

    Source: E. Cubuk et al., RandAugment, 2020; the operations and ranges are torchvision's.
    """
    names = list(OPERATIONS)
    for _ in range(operations):
        name = names[int(uniform(rng, 0, len(names)))]
        sign = 1 if uniform(rng) < 0.5 else -1
        image = OPERATIONS[name](image, sign * strength, list(fill))
    return image


def erase(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Normalized `pixels` `(3, height, width)` with a rectangle set to 0, the mean: 2 to 33 % of the area, aspect ratio 3:10 to
    10:3.

    Source: Z. Zhong et al., Random Erasing Data Augmentation, AAAI 2020.
    """
    height, width = pixels.shape[-2:]
    for _ in range(10):
        area = height * width * uniform(rng, 0.02, 0.33)
        shape = math.exp(uniform(rng, math.log(0.3), math.log(10 / 3)))
        high, wide = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < high < height and 0 < wide < width:
            top, left = int(uniform(rng, 0, height - high + 1)), int(uniform(rng, 0, width - wide + 1))
            erased = pixels.clone()
            erased[:, top : top + high, left : left + wide] = 0
            return erased
    return pixels


def _shear(image: Image.Image, x: float, y: float, fill: list[float]) -> Image.Image:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(image, 0.0, [0, 0], 1.0, degrees, InterpolationMode.BILINEAR, fill, center=[0, 0])


def _shift(image: Image.Image, x: float, y: float, fill: list[float]) -> Image.Image:
    return F.affine(image, 0.0, [int(x), int(y)], 1.0, [0.0, 0.0], InterpolationMode.BILINEAR, fill)


# name: function of an image, a strength in [-1, 1] (operations without a direction use its absolute value) and a fill
OPERATIONS: dict[str, _Operation] = {
    "Identity": lambda p, s, fill: p,
    "ShearX": lambda p, s, fill: _shear(p, 0.3 * s, 0.0, fill),
    "ShearY": lambda p, s, fill: _shear(p, 0.0, 0.3 * s, fill),
    "TranslateX": lambda p, s, fill: _shift(p, s * 150 / 331 * p.width, 0.0, fill),
    "TranslateY": lambda p, s, fill: _shift(p, 0.0, s * 150 / 331 * p.height, fill),
    "Rotate": lambda p, s, fill: F.rotate(p, 30 * s, InterpolationMode.BILINEAR, fill=fill),
    "Brightness": lambda p, s, fill: F.adjust_brightness(p, 1 + 0.9 * s),
    "Color": lambda p, s, fill: F.adjust_saturation(p, 1 + 0.9 * s),
    "Contrast": lambda p, s, fill: F.adjust_contrast(p, 1 + 0.9 * s),
    "Sharpness": lambda p, s, fill: F.adjust_sharpness(p, 1 + 0.9 * s),
    "Posterize": lambda p, s, fill: F.posterize(p, 8 - round(4 * abs(s))),
    "Solarize": lambda p, s, fill: F.solarize(p, 255 * (1 - abs(s))),
    "AutoContrast": lambda p, s, fill: F.autocontrast(p),
    "Equalize": lambda p, s, fill: F.equalize(p),
}

"""Image transforms: the model's own evaluation transform, and augmentation that depends on (seed, epoch, index) only.

No global generator is used, so that transforms may run in any number of threads and in any order, and a resumed run gets the same
samples as an uninterrupted one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from veneer.injection.errors import VeneerError
from veneer.training.loop.seeds import generator

from .augmentation import erase, rand_augment, uniform

Augmentation = Literal["none", "light", "flip", "strong"]
_AUGMENTATIONS = ("none", "light", "flip", "strong")
_KNOWN = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


class ViewError(VeneerError, ValueError):
    """Invalid configuration of a transform."""


class EvalView:
    """Evaluation transform, equal to timm's.

    Args:
        config: timm's data config, as from `resolve_data_config`: input_size (3, height, width), interpolation, mean, std,
            crop_pct, crop_mode; missing values are timm's defaults. For open_clip's transform: crop_pct 1.0 and crop_mode center.
        squash: resize to exactly the input size, ignoring the aspect ratio, without a crop (VTAB's preprocessing).

    Attributes:
        size: (height, width) of the result.
        side: short side that images may be downscaled to before the transform, or None if that would change the result.

    Raises:
        ViewError: no input size, or not three channels.
    """

    def __init__(self, config: Mapping[str, Any], *, squash: bool = False) -> None:
        self.config = _resolved(config) | ({"crop_pct": 1.0, "crop_mode": "squash"} if squash else {})
        self.size: tuple[int, int] = tuple(self.config["input_size"][-2:])
        self.side: int | None = None
        self._transform = _eval_transform(self.config)

    def __call__(self, image: Image.Image, epoch: int = 0, index: int = 0) -> Tensor:
        """`(3, height, width)`, float32, normalized. `epoch` and `index` are ignored."""
        return self._transform(image)


class TrainView:
    """Training transform with augmentation.

    - `none`: the evaluation transform.
    - `light`: random resized crop: 50 to 100 % of the area, aspect ratio 3:4 to 4:3.
    - `flip`: `light`, and a horizontal flip with probability 0.5.
    - `strong`: `flip`, then two RandAugment operations of magnitude 9 of 30, then random erasing of 2 to 33 % of the area with
      probability 0.25.

    Args:
        config: see `EvalView`.
        augmentation: `none`, `light`, `flip` or `strong`.
        seed: of all random samples, together with the epoch and the image's index.
        mirror: False disables the horizontal flip in `flip` and `strong`, for images such as digits; see `Source.mirror`. A
            function of the image's index for images of several sources.
        squash: for `none`; see `EvalView`.

    Raises:
        ViewError: as `EvalView`, or an unknown augmentation.

    Source: R. Zhang et al., Tip-Adapter, ECCV 2022 (their training transform) for `flip`; E. Cubuk et al., RandAugment, 2020,
    and Z. Zhong et al., Random Erasing, 2020, for `strong`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        augmentation: Augmentation,
        seed: int,
        *,
        mirror: bool | Callable[[int], bool] = True,
        squash: bool = False,
    ) -> None:
        if augmentation not in _AUGMENTATIONS:
            message = f"view: augmentation is {augmentation!r}; expected one of {', '.join(_AUGMENTATIONS)}."
            raise ViewError(message, where="augmentation", given=augmentation, expected=tuple(_AUGMENTATIONS))
        self.augmentation, self.seed = augmentation, seed
        self.mirror = mirror if augmentation in ("flip", "strong") else False
        self._plain = EvalView(config, squash=squash)
        self.size = self._plain.size
        # the smallest crop has sqrt(1/2 * 3/4) of the side, so that no crop is enlarged
        self.side = None if augmentation == "none" else math.ceil(max(self.size) / math.sqrt(0.5 * 0.75))
        resolved = self._plain.config
        self._mean, self._std = list(resolved["mean"]), list(resolved["std"])
        self._mode = InterpolationMode(resolved["interpolation"])

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        """`(3, height, width)`, float32, normalized: a pure function of the image, the seed, the epoch and the index."""
        if self.augmentation == "none":
            return self._plain(image)
        rng = generator(self.seed, "view", epoch, index)
        augmented = F.resized_crop(image, *crop_window(image.size[::-1], rng), list(self.size), self._mode)
        if uniform(rng) < 0.5 and (self.mirror(index) if callable(self.mirror) else self.mirror):
            augmented = F.hflip(augmented)
        strong = self.augmentation == "strong"
        if strong:
            augmented = rand_augment(augmented, rng, fill=[round(255 * each) for each in self._mean])
        pixels = F.normalize(F.to_tensor(augmented), self._mean, self._std)
        return erase(pixels, rng) if strong and uniform(rng) < 0.25 else pixels


def crop_window(
    size: tuple[int, int],
    rng: torch.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop of an image of (height, width).

    The area is uniform in `scale`, width over height log-uniform in `ratio`. If ten samples do not fit into the image, the result
    is the largest center crop within `ratio`.
    """
    height, width = size
    for _ in range(10):
        area = height * width * uniform(rng, *scale)
        shape = math.exp(uniform(rng, math.log(ratio[0]), math.log(ratio[1])))
        wide, high = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < high <= height:
            top = int(uniform(rng, 0, height - high + 1))
            left = int(uniform(rng, 0, width - wide + 1))
            return top, left, high, wide
    high = min(height, round(width / ratio[0]))
    wide = min(width, round(height * ratio[1]))
    return (height - high) // 2, (width - wide) // 2, high, wide


def _resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    from timm.data.config import resolve_data_config

    size = config.get("input_size")
    if size is None or len(size) != 3 or size[0] != 3:
        raise ViewError(
            f"view: input_size is {size!r}; expected (3, height, width). Pass the model's data config, such as "
            "timm.data.resolve_model_data_config(model).",
            where="input_size",
            given=size,
        )
    resolved = resolve_data_config({}, pretrained_cfg={key: config[key] for key in _KNOWN if config.get(key) is not None})
    if resolved["interpolation"] == "random":
        resolved["interpolation"] = "bilinear"
    return resolved


def _eval_transform(config: Mapping[str, Any]) -> Any:
    from timm.data.transforms_factory import create_transform

    return create_transform(**config, is_training=False)

"""From a picture to the model's input: the model's own eval transform, and augmentations drawn from (seed, epoch, index) alone.

No draw comes from a generator of the process, so views may run in any number of threads and in any order, and a resumed run sees
what an uninterrupted one does.
"""

import math
from collections.abc import Mapping
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
    """A view that cannot be made."""


class EvalView:
    """The picture as the model wants it for prediction; equal to timm's own eval transform.

    Args:
        config: as timm's `resolve_data_config` gives it: input_size (3, height, width), interpolation, mean, std, crop_pct,
            crop_mode; what is missing is timm's default. For open_clip's own transform: crop_pct 1.0 and crop_mode center.
        squash: resize to exactly the input size, whatever the shape, and cut nothing off (VTAB's preprocessing).

    Attributes:
        size: (height, width) of the result.
        side: pixels of short side that a picture may be shrunk to beforehand, or None where that would change the result.

    Raises:
        ViewError: no input size, or not three channels.
    """

    def __init__(self, config: Mapping[str, Any], *, squash: bool = False) -> None:
        self.config = _resolved(config) | ({"crop_pct": 1.0, "crop_mode": "squash"} if squash else {})
        self.size: tuple[int, int] = tuple(self.config["input_size"][-2:])
        self.side: int | None = None
        self._transform = _eval_transform(self.config)

    def __call__(self, picture: Image.Image, epoch: int = 0, index: int = 0) -> Tensor:
        """`(3, height, width)`, float32, normalised. `epoch` and `index` change nothing."""
        return self._transform(picture)


class TrainView:
    """The picture as it is trained on in an epoch.

    - `none`: the eval view.
    - `light`: a random window of 50 to 100 % of the area and 3:4 to 4:3 in shape, resized.
    - `flip`: `light`, mirrored half of the time.
    - `strong`: `flip`, then two operations of RandAugment of strength 9 of 30, then, a quarter of the time, a patch of 2 to 33 %
      of the area set to the mean.

    Args:
        config: see `EvalView`.
        augmentation: `none`, `light`, `flip` or `strong`.
        seed: of all draws, together with the epoch and the picture's index.
        mirror: False where left and right mean something, as in digits: `flip` and `strong` then mirror nothing; see
            `Source.mirror`.
        squash: for `none`; see `EvalView`.

    Raises:
        ViewError: as `EvalView`, or an unknown augmentation.

    Source: R. Zhang et al., Tip-Adapter, ECCV 2022 (their training transform) for `flip`; E. Cubuk et al., RandAugment, 2020,
    and Z. Zhong et al., Random Erasing, 2020, for `strong`.
    """

    def __init__(
        self, config: Mapping[str, Any], augmentation: Augmentation, seed: int, *, mirror: bool = True, squash: bool = False
    ) -> None:
        if augmentation not in _AUGMENTATIONS:
            message = f"view: augmentation is {augmentation!r}; expected one of {', '.join(_AUGMENTATIONS)}."
            raise ViewError(message, where="augmentation", given=augmentation, expected=tuple(_AUGMENTATIONS))
        self.augmentation, self.seed, self.mirror = augmentation, seed, mirror and augmentation in ("flip", "strong")
        self._plain = EvalView(config, squash=squash)
        self.size = self._plain.size
        # the smallest window has sqrt(1/2 * 3/4) of the sides, so that it is never enlarged
        self.side = None if augmentation == "none" else math.ceil(max(self.size) / math.sqrt(0.5 * 0.75))
        found = self._plain.config
        self._mean, self._std = list(found["mean"]), list(found["std"])
        self._mode = InterpolationMode(found["interpolation"])

    def __call__(self, picture: Image.Image, epoch: int, index: int) -> Tensor:
        """`(3, height, width)`, float32, normalised: a pure function of the picture, the seed, the epoch and the index."""
        if self.augmentation == "none":
            return self._plain(picture)
        draws = generator(self.seed, "view", epoch, index)
        seen = F.resized_crop(picture, *window(picture.size[::-1], draws), list(self.size), self._mode)
        if uniform(draws) < 0.5 and self.mirror:
            seen = F.hflip(seen)
        strong = self.augmentation == "strong"
        if strong:
            seen = rand_augment(seen, draws, fill=[round(255 * each) for each in self._mean])
        pixels = F.normalize(F.to_tensor(seen), self._mean, self._std)
        return erase(pixels, draws) if strong and uniform(draws) < 0.25 else pixels


def window(
    size: tuple[int, int],
    draws: torch.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a window in a picture of (height, width): area uniform in `scale`, width over height
    log-uniform in `ratio`. If ten draws do not fit into the picture: the largest window within `ratio` in its middle."""
    height, width = size
    for _ in range(10):
        area = height * width * uniform(draws, *scale)
        shape = math.exp(uniform(draws, math.log(ratio[0]), math.log(ratio[1])))
        wide, high = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < high <= height:
            top = int(uniform(draws, 0, height - high + 1))
            left = int(uniform(draws, 0, width - wide + 1))
            return top, left, high, wide
    high = min(height, round(width / ratio[0]))
    wide = min(width, round(height * ratio[1]))
    return (height - high) // 2, (width - wide) // 2, high, wide


def _resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    from timm.data.config import resolve_data_config

    size = config.get("input_size")
    if size is None or len(size) != 3 or size[0] != 3:
        raise ViewError(
            f"view: input_size is {size!r}; expected (3, height, width). Give the model's data config, such as "
            "timm.data.resolve_model_data_config(model).",
            where="input_size",
            given=size,
        )
    found = resolve_data_config({}, pretrained_cfg={key: config[key] for key in _KNOWN if config.get(key) is not None})
    if found["interpolation"] == "random":
        found["interpolation"] = "bilinear"
    return found


def _eval_transform(config: Mapping[str, Any]) -> Any:
    from timm.data.transforms_factory import create_transform

    return create_transform(**config, is_training=False)

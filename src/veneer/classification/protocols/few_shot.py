"""Few-shot curves: accuracy after training on several numbers of images per class, of the same dataset.

Each seed samples its own training and validation images; with one seed, fewer shots are a subset of more. All runs have the same
test images. A search runs once for each method, on the largest number of shots with the first seed, and its learning rate is that
of all numbers of shots and seeds.

Source: Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, section 4.1: 1, 2, 4, 8 and 16 images per class,
min(shots, 4) validation images per class, three samples. Deviation: any dataset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from veneer.injection.errors import OptionError

from ..data.run_data import Data, require_images
from ..data.splits import limit_shots


def check_shots(shots: Sequence[int]) -> None:
    """Raises if numbers of images per class are not different numbers of at least 1.

    Raises:
        OptionError: with the numbers as `given`.
    """
    if min(shots, default=1) < 1 or len(set(shots)) < len(shots):
        message = f"shots: {' '.join(map(str, shots))}; expected different numbers of at least 1, such as 1 2 4 8 16."
        raise OptionError(message, option="shots", given=tuple(shots), expected="different numbers of at least 1")


def few_shot_data(data: Data, shots: int, seed: int) -> Data:
    """The data with at most `shots` training and min(shots, 4) validation images per class, sampled with a seed.

    Raises:
        DataError: images with several labels, or no validation images.
    """
    splits = limit_shots(data.source, data.splits, shots, seed)
    require_images(data.source.where, {name: getattr(splits, name) for name in ("train", "validation", "test")})
    return dataclasses.replace(data, splits=splits, notes=splits.notes)

"""Agreement of an image with a control map: the map of the image is computed and compared with the target map.

With w the target map and m the map of the image:

- **canny, scribble**: F1 with a tolerance of t pixels. A white pixel of m is a true positive if one of w is within distance t
  (Euclidean), and one of w is recalled if one of m is within t; precision P and recall R are their fractions,
  F1 = 2 P R / (P + R). t = max(1, round(side / 200)) of the shorter side: 1 at 64, 3 at 512, 5 at 1024. White is 128 or more.
  Two empty maps: 1; one: 0.
- **soft_edge**: Pearson correlation of the two maps, each smoothed by a Gaussian of σ = t, clipped at 0. A correlation instead of
  F1, since edges have continuous strength, and an image with half the contrast has the same edges and score. The mean is
  subtracted, so that maps of unrelated images score near 0, and uniform faint gray does not score high. A map is empty if the
  range of its values is below 3 of 255. Two empty maps: 1; one: 0.
- **`grey`, blur, palette, low_resolution**: 1 - RMSE(m, w) / RMSE(c, w), clipped at 0, where c is the best image of one color,
  the mean of w. A uniform image scores 0. RMSE(c, w) is at least 1 of 255, so that a uniform w requires its own color.
- **mask**: intersection over union of the white pixels. Two empty maps: 1; one: 0.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from veneer.injection.errors import OptionError

from .maps.color_modes import Array, luminance, to_rgb
from .maps.maps import Condition, computed, get

T = TypeVar("T")
Mask = npt.NDArray[np.bool_]
Score = Callable[[Image.Image, Image.Image], float]


def agreement(condition: Condition | str, wanted_map: Image.Image, image: Image.Image) -> float:
    """Agreement of `image` with `wanted_map`, in [0, 1]; 1 is best. The formula of each condition: see the module.

    Args:
        condition: a condition with computed maps, or its name.
        wanted_map: target map, of the size of the image.
        image: generated image.

    Raises:
        UnknownName: an unknown condition.
        VeneerError: a condition without computed maps, or different sizes.
    """
    condition = get(condition) if isinstance(condition, str) else condition
    if condition.measures is None:
        raise OptionError(
            f"agreement: condition {condition.name!r} ({condition.description}) has no metric; expected one of: "
            f"{', '.join(computed())}.",
            option="condition",
            given=condition.name,
            expected=tuple(computed()),
        )
    if wanted_map.size != image.size:
        wanted, given = ("{} x {}".format(*each.size) for each in (wanted_map, image))
        raise OptionError(
            f"agreement: a map of {wanted} for an image of {given}; expected equal sizes. Compute the map at the image's size, "
            "or resize it with `veneer.control.maps.resize.resize_map`.",
            option="wanted_map",
            given=wanted_map.size,
            expected=image.size,
        )
    score = correlation if condition.name == "soft_edge" else _SCORES[condition.measures]
    return score(wanted_map, condition(image))


def mismatched(maps: Sequence[T]) -> list[T]:
    """The maps of other items, deterministically: item i gets that of i + n // 2, modulo n.

    The score with mismatched maps shows whether a control adapter uses its map.

    Raises:
        VeneerError: fewer than two maps.
    """
    if len(maps) < 2:
        message = f"mismatched: {len(maps)} map(s); expected at least 2."
        raise OptionError(message, option="maps", given=len(maps), expected=2)
    half = len(maps) // 2
    return [*maps[half:], *maps[:half]]


def tolerance(size: tuple[int, int]) -> int:
    """Tolerance of edge positions in pixels, for an image of (width, height)."""
    return max(1, round(min(size) / 200))


def line_f1(wanted: Image.Image, made: Image.Image) -> float:
    """F1 of white lines with a tolerance; see the module."""
    reach = tolerance(wanted.size)
    w, m = _white(wanted), _white(made)
    if not w.any() or not m.any():
        return float(w.any() == m.any())
    precision, recall = _near(m, w, reach), _near(w, m, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def correlation(wanted: Image.Image, made: Image.Image) -> float:
    """Correlation of smoothed brightness, at least 0; see the module."""
    maps = [luminance(each) for each in (wanted, made)]
    empty = [bool(np.ptp(each) < 2.5 / 255) for each in maps]
    if any(empty):
        return float(all(empty))
    w, m = (_centered(ndimage.gaussian_filter(each, tolerance(wanted.size), mode="nearest")) for each in maps)
    spread = float(np.sqrt((w * w).sum() * (m * m).sum()))
    return float(np.clip((w * m).sum() / spread, 0, 1)) if spread else 0.0


def explained(wanted: Image.Image, made: Image.Image) -> float:
    """Explained deviation of colors; see the module."""
    w, m = (np.asarray(to_rgb(each), np.float64) for each in (wanted, made))
    spread = np.sqrt(((w - w.mean((0, 1))) ** 2).mean())
    return float(max(0.0, 1 - np.sqrt(((m - w) ** 2).mean()) / max(spread, 1.0)))


def overlap(wanted: Image.Image, made: Image.Image) -> float:
    """Intersection over union of the white pixels; see the module."""
    w, m = _white(wanted), _white(made)
    union = int((w | m).sum())
    return int((w & m).sum()) / union if union else 1.0


_SCORES: dict[str, Score] = {"edges": line_f1, "tones": explained, "region": overlap}


def _near(ours: Mask, theirs: Mask, reach: int) -> float:
    """Fraction of the first mask's pixels with a pixel of the second within `reach`."""
    return float((ndimage.distance_transform_edt(~theirs)[ours] <= reach).mean())


def _white(image: Image.Image) -> Mask:
    white: Mask = luminance(image) >= 128 / 255
    return white


def _centered(values: Array) -> npt.NDArray[np.float64]:
    return values.astype(np.float64) - values.mean(dtype=np.float64)

"""Figures of a personalisation run: how like the photos, how true to the prompt, how much else has changed.

With unit features `f` of an image model (and `t` of its text model), photos P, and for each prompt and seed the picture g of the
adapted and b of the base pipeline, made from the same noise:

- **likeness**          mean over p in P of ⟨f(g), f(p)⟩: CLIP-I with a CLIP, DINO with a DINO
- **nearest**           max over p in P of ⟨f(g), f(p)⟩: near 1 means a photo was copied
- **prompt likeness**   ⟨f(g), t(prompt)⟩: CLIP-T
- **drift**             1 − ⟨f(g), f(b)⟩ on prompts that do not name the concept; 0 means nothing else changed
- **pixel drift**       root mean square of g − b in [0, 1], on the same prompts

Every figure is a mean over pictures (prompts × seeds) with a 95 % t-interval. Base and adapted pictures are paired, so the
interval of `gain` is that of the paired differences, and is much narrower than the two intervals beside it suggest. Pictures of
one prompt are treated as independent: with few prompts, the interval speaks of these prompts, not of all that one could ask.

Source: Ruiz et al., DreamBooth, CVPR 2023, section 4.1 (DINO, CLIP-I: mean pairwise cosine of generated and real pictures;
CLIP-T). Deviation: any feature model; the base's own pictures stand beside; the made-up word can be replaced in the text of
CLIP-T (`words`), as CLIP does not know it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from veneer.injection.errors import VeneerError

from .feature_models import Features
from .previews import Pair, replaced


@dataclass(frozen=True)
class Figure:
    """A mean over `n` pictures with its 95 % interval; None where n is 1 and there is none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f} (n = 1)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Compared:
    """A figure on the adapted pipeline, on the base, and the mean of the paired differences."""

    adapted: Figure
    base: Figure
    gain: Figure

    @property
    def clear(self) -> bool:
        """True if the whole interval of the gain is above 0."""
        return self.gain.low is not None and self.gain.low > 0


@dataclass(frozen=True)
class Metrics:
    """All figures; `prompt_likeness` is None without a text model, the drifts are None without unrelated prompts.

    Attributes:
        features: the feature model.
        likeness, nearest, prompt_likeness: see the module.
        ceiling: likeness of the photos to one another, which no personalisation should be expected to exceed; None for one photo.
        drift, pixel_drift: on unrelated prompts.
        unrelated_distance: mean of 1 − ⟨f(b), f(b')⟩ over the base's images of two different unrelated prompts, which gives drift
            a scale; None with fewer than two such prompts.
        layout: how far background and place follow the prompt, whatever the subject: see `layout`; None with one prompt
            or one image of each.
    """

    features: str
    likeness: Compared
    nearest: Compared
    prompt_likeness: Compared | None
    ceiling: Figure | None
    drift: Figure | None
    pixel_drift: Figure | None
    unrelated_distance: float | None = None
    layout: Compared | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'':18}{'adapted':26}{'base':26}gain"]
        for name in ("likeness", "nearest", "prompt_likeness"):
            found: Compared | None = getattr(self, name)
            if found:
                lines.append(f"{name.replace('_', ' '):18}{found.adapted!s:26}{found.base!s:26}{found.gain}")
        for name in ("ceiling", "drift", "pixel_drift"):
            figure: Figure | None = getattr(self, name)
            if figure:
                lines.append(f"{name.replace('_', ' '):18}{figure}")
        return "\n".join([*lines, f"features: {self.features}; mean and 95 % interval over pictures"])


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    from scipy.stats import t  # its import takes half a second

    return float(t.ppf(0.975, freedom))


def figure(values: Sequence[float] | Tensor) -> Figure:
    """Mean and t-interval: mean ± t(n − 1) · s / √n, with s the sample standard deviation.

    Raises:
        VeneerError: no values, or one that is not finite.
    """
    x = np.asarray([float(v) for v in values], dtype=np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise VeneerError(f"metrics: expected finite values, got {x.tolist()[:8]}", given=tuple(x.tolist()), expected="finite")
    mean = float(x.mean())
    if len(x) == 1:
        return Figure(mean, None, None, 1)
    half = t_quantile(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Figure(mean, mean - half, mean + half, len(x))


def difference(later: Sequence[float], earlier: Sequence[float]) -> Figure:
    """Difference of the means of two independent samples with its 95 % interval, variances unequal.

    Source: Welch, The generalization of Student's problem when several different population variances are involved, Biometrika
    34, 1947; the degrees of freedom are rounded down.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (later, earlier))
    mean, n = float(a.mean() - b.mean()), len(a) + len(b)
    if min(len(a), len(b)) < 2:
        return Figure(mean, None, None, n)
    shares = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
    total = sum(shares)
    if not total:
        return Figure(mean, mean, mean, n)
    freedom = total**2 / (shares[0] ** 2 / (len(a) - 1) + shares[1] ** 2 / (len(b) - 1))
    half = t_quantile(max(1, int(freedom))) * math.sqrt(total)
    return Figure(mean, mean - half, mean + half, n)


def compared(adapted: Sequence[float] | Tensor, base: Sequence[float] | Tensor) -> Compared:
    """Figures of two paired samples, and of their differences."""
    gains = [float(a) - float(b) for a, b in zip(adapted, base, strict=True)]
    return Compared(figure(adapted), figure(base), figure(gains))


def measure(
    features: Features,
    photos: Sequence[Image.Image],
    concept: Sequence[Pair],
    unrelated: Sequence[Pair] = (),
    words: Mapping[str, str] | None = None,
) -> Metrics:
    """All figures from pictures that are there.

    Args:
        photos: what was trained on. `concept`: pictures of prompts that name it. `unrelated`: of prompts that do not.
        words: replacements in a prompt before the text model reads it, such as `{"<toy>": "toy"}`.
    Raises:
        VeneerError: no photos or no pictures of the concept.
    """
    if not photos or not concept:
        message = f"metrics: got {len(photos)} photos and {len(concept)} pictures of the concept; expected some of both."
        raise VeneerError(message, where="photos", given=(len(photos), len(concept)))
    real = features.pictures(photos)
    adapted, base = (features.pictures([getattr(pair, side) for pair in concept]) for side in ("adapted", "base"))
    texts = features.texts([replaced(pair.prompt, words or {}) for pair in concept])
    drifted = drifts(features, unrelated) if unrelated else None
    return Metrics(
        features=features.name,
        likeness=compared(likeness(adapted, real), likeness(base, real)),
        nearest=compared(nearest(adapted, real), nearest(base, real)),
        prompt_likeness=None if texts is None else compared(cosine(adapted, texts), cosine(base, texts)),
        ceiling=ceiling(real) if len(photos) > 1 else None,
        drift=drifted[0] if drifted else None,
        pixel_drift=drifted[1] if drifted else None,
        unrelated_distance=prompt_distance(features, unrelated),
        layout=layout(concept),
    )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """⟨a_i, b_i⟩ of unit rows, (n,)."""
    return (a * b).sum(-1)


def likeness(pictures: Tensor, photos: Tensor) -> Tensor:
    """Mean cosine of each picture (n, width) to all photos (m, width), (n,)."""
    return (pictures @ photos.T).mean(1)


def nearest(pictures: Tensor, photos: Tensor) -> Tensor:
    """Cosine of each picture to its nearest photo, (n,)."""
    return (pictures @ photos.T).amax(1)


def ceiling(photos: Tensor) -> Figure:
    """Likeness of each photo to the others, photo by photo."""
    n = len(photos)
    others = (photos @ photos.T).masked_fill(torch.eye(n, dtype=torch.bool), 0.0)
    return figure(others.sum(1) / (n - 1))


def drifts(features: Features, unrelated: Sequence[Pair]) -> tuple[Figure, Figure]:
    """(feature drift, pixel drift) over pairs."""
    adapted, base = (features.pictures([getattr(pair, side) for pair in unrelated]) for side in ("adapted", "base"))
    return figure(1 - cosine(adapted, base)), figure([pixel_distance(pair.adapted, pair.base) for pair in unrelated])


def prompt_distance(features: Features, unrelated: Sequence[Pair]) -> float | None:
    """Mean of 1 − ⟨f(b), f(b')⟩ over the base's images of two different prompts; None if there are no two."""
    different = torch.tensor([[a.prompt != b.prompt for b in unrelated] for a in unrelated], dtype=torch.bool)
    if not different.any():
        return None
    base = features.pictures([pair.base for pair in unrelated])
    return float((1 - base @ base.T)[different].mean())


def layout(concept: Sequence[Pair]) -> Compared | None:
    """Mean distance of an image to the base's images of other prompts, minus that to the base's other images of its own prompt.

    Distances are root mean squares between images reduced to 8×8 pixels, where background and place are left and the subject is
    not. 0 means that the prompt makes no difference. None if there are no two prompts, or one image of each.
    """
    own = np.array([[a.prompt == b.prompt for b in concept] for a in concept])
    same, other = own & ~np.eye(len(concept), dtype=bool), ~own
    if not (same.any(1) & other.any(1)).all():
        return None
    base = np.stack([_thumbnail(pair.base) for pair in concept])

    def margins(images: Sequence[Image.Image]) -> list[float]:
        small = np.stack([_thumbnail(image) for image in images])
        apart = np.sqrt(((small[:, None] - base[None]) ** 2).mean((2, 3, 4)))
        found: list[float] = ((apart * other).sum(1) / other.sum(1) - (apart * same).sum(1) / same.sum(1)).tolist()
        return found

    return compared(margins([pair.adapted for pair in concept]), margins([pair.base for pair in concept]))


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), dtype=np.float64) / 255


def pixel_distance(a: Image.Image, b: Image.Image) -> float:
    """Root mean square of the difference of two RGB pictures of one size, in [0, 1]."""
    x, y = (np.asarray(picture.convert("RGB"), dtype=np.float64) / 255 for picture in (a, b))
    return float(np.sqrt(np.mean((x - y) ** 2)))

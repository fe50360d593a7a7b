"""Metrics of a personalization run: similarity to the photos, similarity to the prompt, and drift of other prompts.

With unit features `f` of an image model (and `t` of its text model), photos P, and for each prompt and seed the image g of the
adapted and b of the base pipeline, generated from the same noise:

- **similarity**          mean over p in P of ⟨f(g), f(p)⟩: CLIP-I with a CLIP, DINO with a DINO
- **nearest**             max over p in P of ⟨f(g), f(p)⟩: near 1 means a photo was copied
- **prompt similarity**   ⟨f(g), t(prompt)⟩: CLIP-T
- **drift**               1 − ⟨f(g), f(b)⟩ on prompts without the concept; 0 means that other prompts are unaffected
- **pixel drift**         root mean square of g − b in [0, 1], on the same prompts

The keys of `result.json` are `similarity`, `nearest`, `prompt_similarity`, `drift` and `pixel_drift`.

Every metric is a mean over images (prompts × seeds) with a 95 % t-interval. Base and adapted images are paired, so the interval
of `gain` is that of the paired differences, and is much narrower than the two other intervals. Images of one prompt are treated
as independent: with few prompts, the interval describes these prompts, not all possible ones.

Source: Ruiz et al., DreamBooth, CVPR 2023, section 4.1 (DINO, CLIP-I: mean pairwise cosine of generated and real images;
CLIP-T). Deviation: any feature model; the same metrics of the base model; the trigger token can be replaced in the text of CLIP-T
(`words`), as CLIP does not know it.
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
from .previews import PreviewPair, replace_words


@dataclass(frozen=True)
class MeanInterval:
    """A mean over `n` values with its 95 % interval; without an interval if n = 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def cell(self, sign: str = "") -> str:
        """`0.352 ± 0.026` for a table, with `sign` "+" also before a positive mean; the mean alone without an interval."""
        half = "" if self.high is None else f" ± {self.high - self.mean:.3f}"
        return f"{self.mean:{sign}.3f}{half}"

    @property
    def half(self) -> float:
        """Half the interval; infinite without one."""
        return math.inf if self.high is None else self.high - self.mean

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f} (n = 1)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class PairedMetric:
    """A metric of the adapted pipeline, of the base model, and the mean of the paired differences."""

    adapted: MeanInterval
    base: MeanInterval
    gain: MeanInterval

    @property
    def clear(self) -> bool:
        """True if the whole interval of the gain is above 0."""
        return self.gain.low is not None and self.gain.low > 0


@dataclass(frozen=True)
class Metrics:
    """All metrics. Without a text model, `prompt_similarity` is missing (None); without unrelated prompts, the drifts.

    Attributes:
        features: the feature model.
        `similarity`, `nearest`, `prompt_similarity`: see the module.
        ceiling: similarity of the photos to one another, an upper bound for personalization; None with one photo.
        drift, pixel_drift: on unrelated prompts.
        unrelated_distance: mean of 1 − ⟨f(b), f(b')⟩ over the base's images of two different unrelated prompts, the
            scale of drift; None with fewer than two such prompts.
        layout: how well background and layout follow the prompt, whatever the subject: see `layout`; None with one
            prompt or one image of each.
    """

    features: str
    similarity: PairedMetric
    nearest: PairedMetric
    prompt_similarity: PairedMetric | None
    ceiling: MeanInterval | None
    drift: MeanInterval | None
    pixel_drift: MeanInterval | None
    unrelated_distance: float | None = None
    layout: PairedMetric | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'':20}{'adapted':26}{'base':26}gain"]
        for name in ("similarity", "nearest", "prompt_similarity"):
            paired: PairedMetric | None = getattr(self, name)
            if paired:
                lines.append(f"{name.replace('_', ' '):20}{paired.adapted!s:26}{paired.base!s:26}{paired.gain}")
        for name in ("ceiling", "drift", "pixel_drift"):
            single: MeanInterval | None = getattr(self, name)
            if single:
                lines.append(f"{name.replace('_', ' '):20}{single}")
        return "\n".join([*lines, f"features: {self.features}; mean and 95 % interval over images"])


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    from scipy.stats import t  # its import takes half a second

    return float(t.ppf(0.975, freedom))


def mean_interval(values: Sequence[float] | Tensor) -> MeanInterval:
    """Mean and t-interval: mean ± t(n − 1) · s / √n, with s the sample standard deviation.

    Raises:
        VeneerError: no values, or one that is not finite.
    """
    x = np.asarray([float(v) for v in values], dtype=np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise VeneerError(f"metrics: expected finite values, got {x.tolist()[:8]}", given=tuple(x.tolist()), expected="finite")
    mean = float(x.mean())
    if len(x) == 1:
        return MeanInterval(mean, None, None, 1)
    half = t_quantile(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return MeanInterval(mean, mean - half, mean + half, len(x))


def difference(later: Sequence[float], earlier: Sequence[float]) -> MeanInterval:
    """Difference of the means of two independent samples with its 95 % interval, variances unequal.

    Source: Welch, The generalization of Student's problem when several different population variances are involved, Biometrika
    34, 1947; the degrees of freedom are rounded down.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (later, earlier))
    mean, n = float(a.mean() - b.mean()), len(a) + len(b)
    if min(len(a), len(b)) < 2:
        return MeanInterval(mean, None, None, n)
    shares = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
    total = sum(shares)
    if not total:
        return MeanInterval(mean, mean, mean, n)
    freedom = total**2 / (shares[0] ** 2 / (len(a) - 1) + shares[1] ** 2 / (len(b) - 1))
    half = t_quantile(max(1, int(freedom))) * math.sqrt(total)
    return MeanInterval(mean, mean - half, mean + half, n)


def compare_paired(adapted: Sequence[float] | Tensor, base: Sequence[float] | Tensor) -> PairedMetric:
    """Metric of two paired samples and of their differences."""
    gains = [float(a) - float(b) for a, b in zip(adapted, base, strict=True)]
    return PairedMetric(mean_interval(adapted), mean_interval(base), mean_interval(gains))


def measure(
    features: Features,
    photos: Sequence[Image.Image],
    concept: Sequence[PreviewPair],
    unrelated: Sequence[PreviewPair] = (),
    words: Mapping[str, str] | None = None,
) -> Metrics:
    """Computes all metrics.

    Args:
        photos: training photos. `concept`: images of prompts with the concept. `unrelated`: of prompts without it.
        words: replacements in prompts for the text model, such as `{"<toy>": "toy"}`.
    Raises:
        VeneerError: no photos or no images of the concept.
    """
    if not photos or not concept:
        message = f"metrics: got {len(photos)} photos and {len(concept)} images of the concept; expected some of both."
        raise VeneerError(message, where="photos", given=(len(photos), len(concept)))
    real = features.images(photos)
    adapted, base = (features.images([getattr(pair, side) for pair in concept]) for side in ("adapted", "base"))
    texts = features.texts([replace_words(pair.prompt, words or {}) for pair in concept])
    drifted = drifts(features, unrelated) if unrelated else None
    return Metrics(
        features=features.name,
        similarity=compare_paired(mean_similarity(adapted, real), mean_similarity(base, real)),
        nearest=compare_paired(nearest(adapted, real), nearest(base, real)),
        prompt_similarity=None if texts is None else compare_paired(cosine(adapted, texts), cosine(base, texts)),
        ceiling=ceiling(real) if len(photos) > 1 else None,
        drift=drifted[0] if drifted else None,
        pixel_drift=drifted[1] if drifted else None,
        unrelated_distance=prompt_distance(features, unrelated),
        layout=layout(concept),
    )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """⟨a_i, b_i⟩ of unit rows, (n,)."""
    return (a * b).sum(-1)


def mean_similarity(images: Tensor, photos: Tensor) -> Tensor:
    """Mean cosine similarity of each image (n, width) to all photos (m, width), (n,)."""
    return (images @ photos.T).mean(1)


def nearest(images: Tensor, photos: Tensor) -> Tensor:
    """Cosine similarity of each image to the nearest photo, (n,)."""
    return (images @ photos.T).amax(1)


def ceiling(photos: Tensor) -> MeanInterval:
    """Mean similarity of each photo to the others."""
    n = len(photos)
    others = (photos @ photos.T).masked_fill(torch.eye(n, dtype=torch.bool), 0.0)
    return mean_interval(others.sum(1) / (n - 1))


def drifts(features: Features, unrelated: Sequence[PreviewPair]) -> tuple[MeanInterval, MeanInterval]:
    """(feature drift, pixel drift) over pairs."""
    adapted, base = (features.images([getattr(pair, side) for pair in unrelated]) for side in ("adapted", "base"))
    return mean_interval(1 - cosine(adapted, base)), mean_interval(
        [pixel_distance(pair.adapted, pair.base) for pair in unrelated]
    )


def prompt_distance(features: Features, unrelated: Sequence[PreviewPair]) -> float | None:
    """Mean of 1 − ⟨f(b), f(b')⟩ over the base's images of two different prompts; None without two prompts."""
    different = torch.tensor([[a.prompt != b.prompt for b in unrelated] for a in unrelated], dtype=torch.bool)
    if not different.any():
        return None
    base = features.images([pair.base for pair in unrelated])
    return float((1 - base @ base.T)[different].mean())


def layout(concept: Sequence[PreviewPair]) -> PairedMetric | None:
    """Mean distance of an image to the base's images of other prompts, minus that to the base's other images of the same prompt.

    Distances are root mean squares between images reduced to 8×8 pixels, which show background and layout but not the subject. 0
    means that the prompt makes no difference. None without two prompts, or with one image of each.
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

    return compare_paired(margins([pair.adapted for pair in concept]), margins([pair.base for pair in concept]))


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), dtype=np.float64) / 255


def pixel_distance(a: Image.Image, b: Image.Image) -> float:
    """Root mean square difference of two RGB images of equal size, in [0, 1]."""
    x, y = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (a, b))
    return float(np.sqrt(np.mean((x - y) ** 2)))

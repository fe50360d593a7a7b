"""Scores of generated images: similarity to photos, identification of the subject, prompt, ground, place and drift.

With unit features f of an image model, photos P_s of subject s, g an image generated with the adapter of s and b the bare base's
image of the same prompt with the class word, from the same noise:

- **similarity**: mean over g, p in P_s of ⟨f(g), f(p)⟩, and of b; their difference is the gain
- **ceiling**: the same of each photo to the others of its subject
- **identified**: share of images whose nearest photo in the gallery, argmax over s, p in P_s of ⟨f(g), f(p)⟩, is one of their
  subject; by mean: with the normalized mean of f over P_s in place of the photos
- **photos identified**: the same of each photo, which is not compared with itself
- **prompt similarity**: mean of ⟨f(g), t(prompt)⟩ on placed prompts, with the class word for the concept, t the text tower
- **prompt contrast**: mean of ⟨f(g), t(prompt)⟩ minus the mean over the other placed prompts, which cancels the class
- **ground, place**: share of images of placed prompts whose ground color and place, measured from pixels, are those asked for
- **drift**: mean of 1 − ⟨f(g), f(b)⟩ on prompts without the concept

The share kept of a score is that with the adapter over that of the base.

Source: similarity, prompt similarity: Ruiz et al., DreamBooth, CVPR 2023, section 4.1 (CLIP-I, CLIP-T); pixels:
`veneer.base_models.pretraining.scene_judge`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from veneer.base_models.pretraining import scene_judge
from veneer.base_models.pretraining.data.scenes import COLORS, PLACES, SIDE
from veneer.training.report.metrics import ceiling, cosine, mean_similarity

GROUND = re.compile(rf"\b({'|'.join(sorted(COLORS, key=len, reverse=True))}) background\b")


def asked(prompt: str) -> tuple[str | None, str | None]:
    """The ground color and the place that a prompt asks for; each None if it names none.

    >>> asked("a small {concept}, top right, black background")
    ('black', 'top right')
    """
    ground = GROUND.search(prompt)
    parts = [part.strip() for part in prompt.split(",")]
    return ground[1] if ground else None, next((part for part in parts if part in PLACES), None)


def obeyed(images: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[float, float | None]:
    """Shares of images with the ground color and with the place of their prompts; the latter None if no prompt names a place.

    Args:
        images: of any size; they are measured at the side of the bundled base's scenes.
        prompts: of each image, each with a ground color.
    """
    grounds, places = list[bool](), list[bool]()
    for image, prompt in zip(images, prompts, strict=True):
        seen = scene_judge.measure(np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)))
        ground, place = asked(prompt)
        grounds.append(seen.background == ground)
        if place is not None:
            places.append(seen.place == place)
    return float(np.mean(grounds)), float(np.mean(places)) if places else None


def prompt_contrast(images: Tensor, texts: Tensor) -> float | None:
    """Mean cosine of images to their own prompts minus that to the other prompts; None if there is one prompt.

    Args:
        images: features (prompts · n, width), prompt by prompt. `texts`: features of the prompts (prompts, width).
    """
    count = len(texts)
    if count < 2:
        return None
    cosines = (images @ texts.T).view(count, -1, count).mean(1)
    own = cosines.diagonal().sum()
    return float(own / count - (cosines.sum() - own) / (count * (count - 1)))


def nearest_photo(images: Tensor, gallery: Mapping[str, Tensor]) -> list[str]:
    """For each image (n, width) the subject of its nearest photo. `gallery`: subject to its photos' features (m, width)."""
    best = torch.stack([(images @ photos.T).amax(1) for photos in gallery.values()], 1)
    return [list(gallery)[i] for i in best.argmax(1).tolist()]


def nearest_mean(images: Tensor, gallery: Mapping[str, Tensor]) -> list[str]:
    """For each image the subject whose normalized mean feature is nearest."""
    means = torch.stack([normalize(photos.mean(0), dim=0) for photos in gallery.values()])
    return [list(gallery)[i] for i in (images @ means.T).argmax(1).tolist()]


def photos_identified(gallery: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Share of each subject's photos whose nearest other photo is of their subject; None if the subject has one photo."""
    found = dict[str, float | None]()
    for name, photos in gallery.items():
        hits = list[bool]()
        for i in range(len(photos)):
            rest = torch.cat([photos[:i], photos[i + 1 :]])
            if len(rest):
                hits += [nearest_photo(photos[i : i + 1], {**gallery, name: rest}) == [name]]
        found[name] = float(np.mean(hits)) if hits else None
    return found


def photo_ceiling(photos: Tensor) -> float | None:
    """Mean similarity of each photo to the others; None if there is one photo."""
    return ceiling(photos).mean if len(photos) > 1 else None


def image_scores(
    name: str,
    trained: tuple[Tensor, Tensor, Tensor],
    base: tuple[Tensor, Tensor, Tensor],
    gallery: Mapping[str, Tensor],
) -> dict[str, float]:
    """Scores of one run by one image model.

    Args:
        name: of the subject. `gallery`: subject to its photos' features.
        trained, base: features of images of the concept alone, of placed prompts, and of unrelated prompts.
    """
    photos = gallery[name]
    similarity, before = (float(mean_similarity(side[0], photos).mean()) for side in (trained, base))

    def share(images: Tensor, by: str = "photo") -> float:
        nearest = nearest_photo(images, gallery) if by == "photo" else nearest_mean(images, gallery)
        return float(np.mean([found == name for found in nearest]))

    return {
        "trained": similarity,
        "base": before,
        "gain": similarity - before,
        "placed_gain": float(mean_similarity(trained[1], photos).mean() - mean_similarity(base[1], photos).mean()),
        "identified": share(trained[0]),
        "identified_by_mean": share(trained[0], "mean"),
        "placed_identified": share(trained[1]),
        "base_identified": share(base[0]),
        "drift": float((1 - cosine(trained[2], base[2])).mean()),
    }


def kept(trained: float | None, base: float | None) -> float | None:
    """Share of the base's score that is left; None if the base has none."""
    return None if trained is None or base is None or base <= 0 else trained / base

"""The CLIP: an image tower and a text tower, aligned by one prototype embedding per class name.

A contrastive loss alone was solved by the words for background, size and place, without learning the names. Instead, each name
has a prototype in the joint space; images of the thing and phrases with its name are both classified against the prototypes,
which aligns the towers without contrast within a batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from .autoencoder import to_tensor
from .data import captions
from .data.icon_sets import Icons, Pixels
from .data.photo_dataset import Photograph, crop
from .data.scenes import COLORS, PLACES, SIZES, Scene, jitter, random_canvas
from .muon import optimizers
from .training_loop import TrainingRun, cosine, write_atomic

SIDE = 64
"""Side of the images in pixels; half the side of generated images."""
EMBED = 128
VISION = {"image_size": SIDE, "patch_size": 8, "width": 160, "layers": 5, "head_width": 40}
TEXT = {"context_length": captions.LENGTH, "width": 96, "heads": 4, "layers": 2}
MEAN = STD = (0.5, 0.5, 0.5)


class NamedClip(nn.Module):
    """An open_clip `CLIP`, one prototype per name, and one per instance in photos."""

    def __init__(self, vocabulary: int, names: int, things: int = 0) -> None:
        super().__init__()
        from open_clip import CLIP

        self.clip = CLIP(EMBED, {**VISION, "patch_dropout": 0.5}, {**TEXT, "vocab_size": vocabulary})
        self.prototypes = nn.Parameter(torch.randn(names, EMBED))
        self.things = nn.Parameter(torch.randn(things, EMBED))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def logits(self, features: Tensor, prototypes: Tensor | None = None) -> Tensor:
        """Cosine similarity to every prototype (default: of the names), times the scale: (n, prototypes)."""
        among = self.prototypes if prototypes is None else prototypes
        cosines = F.normalize(features.float(), dim=-1) @ F.normalize(among, dim=-1).T
        return self.log_scale.exp().clamp(max=40) * cosines


@dataclass(frozen=True)
class IconSplit:
    """Icons for training the CLIP (`seen`) and for testing it (`unseen`, `unseen_set`)."""

    seen: list[int]
    unseen: list[int]
    unseen_set: list[int]


def split(
    icons: Icons, names: Sequence[str], sets: Sequence[str], unseen_set: str, more: Sequence[str] = (), seed: int = 3
) -> IconSplit:
    """Holds out one rendering of each name in `names`, and all of `unseen_set`.

    Sets in `more` are only for training, without icons of the same design as a held-out rendering.
    """
    rng = np.random.default_rng(seed)
    kept, alike = set(), set()
    for name in names:
        rows = icons.where({name}, set(sets))
        row = rows[rng.integers(len(rows))]
        kept.add(row)
        alike |= {i for i in icons.where({name}, set(more)) if _design(icons.sets[i]) == _design(icons.sets[row])}
    seen = [i for i in icons.where(sets={*sets, *more}) if i not in kept | alike]
    return IconSplit(seen, sorted(kept), icons.where(set(names), {unseen_set}))


def _design(icon_set: str) -> str:
    """The design family of an icon set: "fluent" of "fluent-emoji-3d"."""
    return icon_set.partition("-")[0]


class PhotoViews:
    """Photos for training the image tower, labeled with a word and with the instance that they show.

    Args:
        photos: with words and instance numbers.
        cutouts: RGBA (n, 128, 128, 4) and the photo of each. Only things with a cutout are used: on their own and on other
            backgrounds, so that the background is not informative.
        backgrounds: photos for the backgrounds.
    """

    def __init__(self, photos: Sequence[Photograph], cutouts: tuple[Pixels, list[int]], backgrounds: list[Image.Image]) -> None:
        self._photos, self._rgba, self._backgrounds = photos, cutouts[0], backgrounds
        self._of: dict[int, list[int]] = {}
        for row, photo in enumerate(cutouts[1]):
            self._of.setdefault(photos[photo].instance, []).append(row)
        self._photo_of = cutouts[1]
        self.instances = list(self._of)
        weights = np.array([10.0 if len(rows) > 1 else 1.0 for rows in self._of.values()])
        self._weights = weights / weights.sum()

    def draw(self, rng: np.random.Generator, n: int) -> tuple[Pixels, list[str], Tensor]:
        """Samples images (n, 64, 64, 3), with their words and their instances as indices in `instances`."""
        chosen = rng.choice(len(self.instances), n, p=self._weights)
        rows = [int(rng.choice(self._of[self.instances[i]])) for i in chosen]
        images = np.stack([self._view(rng, row) for row in rows])
        return images, [self._photos[self._photo_of[row]].word for row in rows], torch.from_numpy(chosen)

    def _view(self, rng: np.random.Generator, row: int) -> Pixels:
        if rng.random() < 0.6:
            return augmented(rng, self._rgba[row], self._backgrounds)
        return jitter(rng, crop(rng, self._photos[self._photo_of[row]].pixels, SIDE, least=0.5), permute=0.0)


def augmented(rng: np.random.Generator, icon: Pixels, photos: list[Image.Image]) -> Pixels:
    """An icon on a random background, with random rotation, flip, scale, translation, color jitter and blur."""
    canvas = random_canvas(rng, photos).resize((SIDE, SIDE), Image.Resampling.BOX)
    side = int(rng.integers(26, 80))
    image = Image.fromarray(icon).resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.rotate(float(rng.normal(0, 20)), Image.Resampling.BILINEAR)
    if rng.random() < 0.3:
        image = _sheared(rng, image)
    room = SIDE - side
    left, top = (int(rng.integers(min(0, room) - side // 8, max(0, room) + side // 8 + 1)) for _ in range(2))
    canvas.paste(image, (left, top), image)
    if rng.random() < 0.15:
        canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.2))))
    return jitter(rng, np.asarray(canvas), permute=0.0)


def _sheared(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """The image with a random shear and stretch about its center."""
    (a, b), (c, d) = np.eye(2) + rng.uniform(-0.25, 0.25, (2, 2))
    half = image.width / 2
    rows = (a, b, half - half * (a + b), c, d, half - half * (c + d))
    return image.transform(image.size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)


def phrase(rng: np.random.Generator, name: str) -> str:
    """A caption with the name; attributes are mostly omitted, and random otherwise."""
    size, place, color = (str(rng.choice(list(kind))) for kind in (SIZES, PLACES, COLORS))
    scene = Scene(0, size, place, color)
    if rng.random() < 0.5:
        return captions.article(name) if rng.random() < 0.7 else name
    return captions.caption(rng, name, scene, str(rng.choice(["noto", "flat", "twemoji", "3d"]))) or name


def train(
    folder: Path,
    model: NamedClip,
    icons: Icons,
    names: list[str],
    seen: list[int],
    photos: list[Image.Image],
    tokenizer: CLIPTokenizer,
    steps: int,
    batch: int = 64,
    favored: frozenset[str] = frozenset(),
    lrs: tuple[float, float] = (2e-3, 1e-3),
    views: PhotoViews | None = None,
) -> NamedClip:
    """Trains (or continues training) the CLIP; names in `favored` are sampled three times as often. Returns EMA weights.

    With `views`, a batch has half as many photos in addition, classified by word and by instance.
    """
    number = {name: i for i, name in enumerate(names)}
    weights = np.array([3.0 if icons.words[i] in favored else 1.0 for i in seen])
    run = TrainingRun(folder, model, optimizers(model, *lrs, decay=0.05), cosine(steps), decay=0.996)
    run.resume()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((17, step))
        torch.manual_seed(step)  # patch dropout
        model.clip.visual.patch_dropout.prob = 0.5 if step < 0.75 * steps else 0.1
        rows = rng.choice(seen, batch, p=weights / weights.sum())
        images, words, things = views.draw(rng, batch // 2) if views else (np.empty((0, SIDE, SIDE, 3), np.uint8), [], None)
        icon_images = np.stack([augmented(rng, icons.rgba[row], photos) for row in rows])
        pixels = to_tensor(np.concatenate([icon_images, images]))
        labels = torch.tensor([number[word] for word in [*(icons.words[row] for row in rows), *words]])
        said = rng.integers(len(names), size=batch)
        ids = ids_of(tokenizer, [phrase(rng, names[i]) for i in said])
        with torch.autocast("cpu", torch.bfloat16):
            seen_features = model.clip.encode_image(pixels)
            read_features = model.clip.encode_text(ids)
        by_image = F.cross_entropy(model.logits(seen_features), labels, label_smoothing=0.05)
        by_text = 0.5 * F.cross_entropy(model.logits(read_features), torch.from_numpy(said))
        if things is None:
            return by_image + by_text
        apart = F.cross_entropy(model.logits(seen_features[batch:], model.things), things, label_smoothing=0.05)
        return by_image + by_text + 0.5 * apart

    run.train(loss, steps)
    model.load_state_dict(run.averaged())
    model.clip.visual.patch_dropout.prob = 0.0
    return model.eval()


def ids_of(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (n, 24)."""
    padded = tokenizer(texts, padding="max_length", max_length=captions.LENGTH, truncation=True, return_tensors="pt")
    return padded.input_ids


def save(model: NamedClip, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes open_clip's local-dir layout, and a `config.json` with which timm reads the image tower from the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = model.clip
    with torch.no_grad():
        clip.logit_scale.fill_(float(model.log_scale.exp().clamp(max=40).log()))
    weights = {name: value.half().contiguous() for name, value in clip.state_dict().items() if name != "attn_mask"}
    write_atomic(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    for name, value in (("open_clip_config.json", _open_clip_config(len(tokenizer))), ("config.json", _timm_config())):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def _open_clip_config(vocabulary: int) -> dict[str, Any]:
    text = {**TEXT, "vocab_size": vocabulary, "hf_tokenizer_name": "bundled_clip", "tokenizer_kwargs": {"clean": "lower"}}
    model = {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"}}


def _timm_config() -> dict[str, Any]:
    heads = VISION["width"] // VISION["head_width"]
    args = {"img_size": SIDE, "patch_size": 8, "embed_dim": VISION["width"], "depth": VISION["layers"], "num_heads": heads}
    pretrained = {
        "input_size": [3, SIDE, SIDE], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0,
        "mean": MEAN, "std": STD, "num_classes": EMBED, "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    return {
        "architecture": "vit_base_patch32_clip_224", "num_classes": EMBED, "global_pool": "token",
        "model_args": args, "pretrained_cfg": pretrained,
    }  # fmt: skip


@torch.no_grad()
def retrieval(clip: Any, icons: Icons, rows: list[int], names: list[str], tokenizer: CLIPTokenizer) -> float:
    """Rank-1 accuracy of icons (plain, on white): fraction whose own name is nearest among the phrases "a NAME"."""
    canvas = np.full((len(rows), SIDE, SIDE, 3), 250, np.uint8)
    for image, row in zip(canvas, rows, strict=True):
        icon = Image.fromarray(icons.rgba[row]).resize((52, 52), Image.Resampling.BOX)
        base = Image.fromarray(image)
        base.paste(icon, (6, 6), icon)
        image[:] = np.asarray(base)
    images = F.normalize(clip.encode_image(to_tensor(canvas)), dim=-1)
    texts = F.normalize(clip.encode_text(ids_of(tokenizer, [captions.article(n) for n in names])), dim=-1)
    best = (images @ texts.T).argmax(-1).tolist()
    return float(np.mean([names[b] == icons.words[row] for b, row in zip(best, rows, strict=True)]))

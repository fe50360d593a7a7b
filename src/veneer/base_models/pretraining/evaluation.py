"""Evaluation of the packaged base models on held-out data: `metrics.json` and an image grid of 64 prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from .. import clip_features, presets
from . import autoencoder, clip, image_grid, packaging, scene_judge
from .data import captions, photo_dataset
from .data.concepts import CLIP_SETS, DRAWN, STYLES, UNSEEN_SET
from .data.icon_sets import Pixels
from .data.photo_dataset import VALIDATION
from .data.scenes import COLORS, SIDE, Scene, sample_scenes
from .data.training_data import World
from .training_loop import write_atomic

NAMES = 100


def evaluate(world: World, bases: Path, out: Path, seeds: Sequence[int] = (0, 1, 2), prompts: int = NAMES) -> dict[str, Any]:
    """Evaluates the models under `bases`, writes `metrics.json` and `sheet.png` to `out`, and returns the metrics.

    Metrics on photos require a folder of photos in `world`.

    Args:
        seeds: of the images; every prompt is generated once per seed.
        prompts: number of prompts, at most 100. The thing is classified among 100 names in any case.
    """
    pipe, judge_clip = load(bases)
    preset = presets.preset(bases / "bundled")
    metrics = {
        "weights": weights(bases, pipe, judge_clip.model),
        "training": json.loads((bases / packaging.TRAINING).read_text()),
        "autoencoder": reconstruction(world, pipe.vae),
        "clip": retrieval(world, judge_clip.model),
        "sampling": {"steps": preset.steps, "guidance_scale": preset.guidance_scale, "seeds": list(seeds)},
    }
    assert preset.guidance_scale is not None  # in the bundled veneer.json
    sampler = SeededSampler(pipe, preset.steps, preset.guidance_scale)
    metrics["generation"] = generation(world, sampler, judge_clip, seeds, prompts)
    if world.photo_folder:
        metrics["photos"] = subject_retrieval(world.photo_folder, judge_clip)
    scenes, more = image_grid.sheet_scenes(world), image_grid.photo_prompts() if world.photo_folder else []
    images = sampler([*map(world.full_caption, scenes), *more], seed=7)
    out.mkdir(parents=True, exist_ok=True)
    image_grid.draw(images, [*image_grid.labels(world, scenes), *more]).save(out / "sheet.png", optimize=True)
    write_atomic(out / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))
    return metrics


def load(bases: Path) -> tuple[Any, clip_features.BaseClip]:
    """Loads the pipeline and the CLIP by the public functions."""
    from ..loading import load as load_pipeline

    pipe = load_pipeline(bases / "bundled")
    pipe.set_progress_bar_config(disable=True)
    return pipe, clip_features.load_clip(bases / "bundled_clip")


def weights(bases: Path, pipe: Any, clip_model: Any) -> dict[str, Any]:
    """Parameter counts and file sizes of all components."""
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "vae": pipe.vae, "clip": clip_model}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    megabytes = {name: round(packaging.weight(bases / name) / 1e6, 2) for name in ("bundled", "bundled_clip")}
    return {"parameters": counts, "megabytes": megabytes}


def reconstruction(world: World, vae: Any) -> dict[str, float]:
    """PSNR in dB of the autoencoder on held-out images: scenes of icons, photos of clothes and of validation subjects."""
    unseen = {"kept_back_concepts_db": world.unseen_images(512), "unseen_style_db": world.unseen_style(512)}
    if folder := world.photo_folder:
        photos = {"clothes": photo_dataset.clothes(folder, "validation"), "subjects": photo_dataset.subjects(folder, VALIDATION)}
        for name, those in photos.items():
            unseen[f"unseen_{name}_db"] = np.stack([photo_dataset.square(photo.pixels, SIDE) for photo in those])
    return {name: round(autoencoder.psnr(vae, images), 2) for name, images in unseen.items()}


def subject_retrieval(folder: Path, judge_clip: clip_features.BaseClip) -> dict[str, Any]:
    """Rank-1 retrieval by the image tower, in percent: photos of validation subjects that are nearest to one of the same subject.

    The photos of all training and validation subjects are searched; `chance` is the percentage of a random choice.
    """
    words = {**VALIDATION, **photo_dataset.SUBJECTS}
    photos = photo_dataset.subjects(folder, words)
    with torch.no_grad():
        pixels = torch.stack([judge_clip.preprocess(Image.fromarray(photo.pixels)) for photo in photos])
        unit = F.normalize(judge_clip.encode_image(pixels), dim=-1).numpy()
    instances = np.array([photo.instance for photo in photos])
    queries = np.flatnonzero(instances < len(VALIDATION))
    others = (instances[queries, None] == instances).sum(1) - 1
    return {
        "percent": round(100 * scene_judge.rank_one(unit, instances, queries), 1),
        "chance": round(100 * float(others.mean()) / (len(photos) - 1), 1),
        "queries": len(queries),
        "photos": len(photos),
        "subjects": len(words),
    }


def retrieval(world: World, model: Any) -> dict[str, Any]:
    """Rank-1 accuracy of the CLIP on unseen renderings in percent, with the number of renderings and names."""
    names = world.words
    parts = clip.split(world.icons, names, CLIP_SETS, UNSEEN_SET)
    drawn = [row for row in parts.unseen if world.icons.words[row] in DRAWN]
    drawn_set = [row for row in parts.unseen_set if world.icons.words[row] in DRAWN]
    cases = {
        "unseen_renderings_all_names": (parts.unseen, names),
        "unseen_renderings_drawn_names": (drawn, list(DRAWN)),
        "unseen_set_all_names": (parts.unseen_set, names),
        "unseen_set_drawn_names": (drawn_set, list(DRAWN)),
    }
    return {
        label: {
            "percent": round(100 * clip.retrieval(model, world.icons, rows, among, world.tokenizer), 1),
            "renderings": len(rows),
            "names": len(among),
        }
        for label, (rows, among) in cases.items()
    }


@dataclass(frozen=True)
class SeededSampler:
    """Generates images with fixed seeds: image `i` of a `seed` is reproducible."""

    pipe: Any
    steps: int
    guidance_scale: float

    def __call__(self, prompts: Sequence[str], seed: int, batch: int = 25) -> Pixels:
        """Images (n, 128, 128, 3) of the prompts."""
        out = []
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            noise = [torch.Generator().manual_seed(100_003 * seed + start + i) for i in range(len(part))]
            settings = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, "output_type": "np"}
            out.append(self.pipe(part, generator=noise, **settings).images)
        return np.asarray(np.concatenate(out) * 255 + 0.5).clip(0, 255).astype(np.uint8)


def named_scenes(world: World) -> list[Scene]:
    """One large, centered scene for each of 100 names of the generator, with varying backgrounds and styles."""
    rng, styles, colors = np.random.default_rng(31), list(STYLES.values()), list(COLORS)
    words = sorted(rng.permutation(list(DRAWN))[:NAMES].tolist())
    icons = [world.icons.where({word}, {styles[i % len(styles)]})[0] for i, word in enumerate(words)]
    return [Scene(icon, "large", "center", colors[i % len(colors)]) for i, icon in enumerate(icons)]


def named_prompt(world: World, scene: Scene) -> str:
    """ "an apple, center, green background, flat style"."""
    word, style = world.icons.words[scene.icon], world.style(scene.icon)
    return f"{captions.article(word)}, {scene.place}, {scene.background} background, {style} style"


def generation(
    world: World, sampler: SeededSampler, judge_clip: clip_features.BaseClip, seeds: Sequence[int], prompts: int
) -> dict[str, Any]:
    """Accuracy of the prompted thing among 100 names, by three classifiers, and of its prompted attributes."""
    scenes, which = named_scenes(world), np.arange(0, NAMES, -(-NAMES // prompts))
    named = [scenes[i] for i in which]
    drawn = np.stack([sampler([named_prompt(world, scene) for scene in named], seed) for seed in seeds])
    true = world.compositor(named)
    free = sample_scenes(np.random.default_rng(32), world.drawn, prompts)
    asked = [world.full_caption(scene) for scene in free]
    obeyed = np.stack([attribute_hits(sampler(asked, seed), free) for seed in seeds])
    ceiling = attribute_hits(world.compositor(free), free)
    things = {
        label: rated(np.stack([hits(images) for images in drawn]), hits(true))
        for label, hits in recognizers(world, scenes, which, judge_clip).items()
    }
    parts = enumerate(("background", "size", "place"))
    return {
        "names": NAMES,
        "prompts": len(which),
        "thing": things,
        "attribute": {part: rated(obeyed[..., i], ceiling[..., i]) for i, part in parts},
    }


def rated(hits: npt.NDArray[np.bool_], of_true: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """The accuracy with its interval, and the accuracy of the same metric on true renderings."""
    return {**scene_judge.share(hits), "true_renderings": round(100 * float(of_true.mean()), 1)}


def attribute_hits(images: Pixels, scenes: Sequence[Scene]) -> npt.NDArray[np.bool_]:
    """Whether each image has the prompted background, size and place, (n, 3)."""
    seen = [scene_judge.measure(image) for image in images]
    pairs = zip(seen, scenes, strict=True)
    return np.array([(a.background == b.background, a.size == b.size, a.place == b.place) for a, b in pairs])


def recognizers(
    world: World, scenes: list[Scene], which: npt.NDArray[np.int64], judge_clip: clip_features.BaseClip
) -> dict[str, Any]:
    """Classifiers of the prompted thing: functions of the images of the scenes `which` that return hits.

    `clip_text`: the nearest of the phrases "a NAME" in the bundled CLIP. `pixels`: the nearest true rendering of any of the
    things, in any style, on the same background, shows the thing. `clip_image`: the same by the image tower's features.
    """
    words = [world.icons.words[scene.icon] for scene in scenes]
    with torch.no_grad():
        phrases = F.normalize(judge_clip.encode_text(judge_clip.tokenizer([captions.article(w) for w in words])), dim=-1)
    variants = [world.icons.where({word}, {icon_set})[0] for icon_set in STYLES.values() for word in words]

    def unit(images: Pixels) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            small = F.interpolate(autoencoder.to_tensor(images), (clip.SIDE, clip.SIDE), mode="area")
            return np.asarray(F.normalize(judge_clip.encode_image(small), dim=-1).numpy())

    def by_rendering(images: Pixels, embed: Any) -> npt.NDArray[np.bool_]:
        best = []
        for image, i in zip(embed(images), which, strict=True):
            said = scenes[i]
            rivals = world.compositor([Scene(icon, said.size, said.place, said.background) for icon in variants])
            best.append(int(scene_judge.nearest(image[None], embed(rivals))[0]) % len(words))
        return np.array(best) == which

    return {
        "clip_text": lambda images: (unit(images) @ phrases.numpy().T).argmax(1) == which,
        "pixels": lambda images: by_rendering(images, scene_judge.flat),
        "clip_image": lambda images: by_rendering(images, unit),
    }

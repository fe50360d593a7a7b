"""Training data shared by the three stages: icons, photos, tokenizer, and the icons and scenes of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import CLIPTokenizer

from . import backgrounds, captions, cutouts, icon_sets, photo_dataset, photo_packages, rendered_models
from .concepts import ALSO_CALLED, CLIP_SETS, DRAWN, KEPT_BACK, STYLES, UNSEEN_SET
from .scenes import SIDE, Compositor, Scene, augmented_images, sample_scenes

PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "brick.png",
    "gravel.png",
    "grass.png",
)
"""Photos in scikit-image's wheel that are in the public domain or CC0."""

CUT = 1400
"""Number of photos of clothes with a cutout."""

RICH = 6000
"""Number of augmented images (photos, gradients, rotated icons) for the autoencoder."""


@dataclass(frozen=True)
class World:
    """The training data of the bundled base models; `folder` caches downloads and renderings, and has the training results."""

    folder: Path
    photo_folder: Path | None = None

    @cached_property
    def photographs(self) -> list[photo_dataset.Photograph]:
        """Real photos with caption words; empty without `photo_folder`."""
        return photo_dataset.load(self.photo_folder) if self.photo_folder else []

    @cached_property
    def cutouts(self) -> tuple[icon_sets.Pixels, list[int]]:
        """Cutouts (n, 128, 128, 4) of photos, and the photo of each: of all subjects, and of some clothes."""
        clothes = [i for i, photo in enumerate(self.photographs) if not photo.subject]
        chosen = sorted(np.random.default_rng(29).permutation(clothes)[:CUT].tolist())
        subjects = [i for i, photo in enumerate(self.photographs) if photo.subject]
        return cutouts.load(self.photographs, chosen + subjects, self.folder / "cutouts.npz")

    @cached_property
    def models(self) -> rendered_models.ModelViews:
        """Views of rendered 3D models, without held-out concepts; empty without `photo_folder`."""
        if not self.photo_folder:
            return rendered_models.ModelViews(np.zeros((0, rendered_models.VIEWS, SIDE, SIDE, 4), np.uint8), [], [])
        views = rendered_models.load(self.modules, self.folder / "turntable.npz")
        kept = [i for i, word in enumerate(views.words) if word not in KEPT_BACK]
        return rendered_models.ModelViews(views.rgba[kept], [views.words[i] for i in kept], [views.names[i] for i in kept])

    @cached_property
    def packaged(self) -> list[photo_dataset.Photograph]:
        """Packaged photos, without cutouts and held-out concepts; empty without `photo_folder`."""
        if not self.photo_folder:
            return []
        images = [p for p in photo_packages.load(self.modules) if p.image.mode == "RGB" and p.word not in KEPT_BACK]
        return [photo_dataset.Photograph(photo_dataset.reduce(photo.image), photo.word, i) for i, photo in enumerate(images)]

    @cached_property
    def modules(self) -> Path:
        """Folder of the downloaded icon packages."""
        return icon_sets.fetch(self.folder)

    @cached_property
    def icons(self) -> icon_sets.Icons:
        """All rendered icons."""
        return icon_sets.render(self.modules, self.folder / "icons.npz")

    @cached_property
    def surroundings(self) -> dict[str, Image.Image]:
        """Background photos with a caption word."""
        return backgrounds.load(self.modules)

    @cached_property
    def photos(self) -> list[Image.Image]:
        """All photos, for backgrounds without a caption word."""
        import skimage

        folder = Path(skimage.__file__).parent / "data"
        return [*(Image.open(folder / name).convert("RGB") for name in PHOTOS), *self.surroundings.values()]

    @cached_property
    def words(self) -> list[str]:
        """All names of icons for the CLIP, in the order of the rendered icons, on which the CLIP's split depends."""
        return list(dict.fromkeys(self.icons.words))

    @cached_property
    def names(self) -> list[str]:
        """All names for the CLIP: of icons and of photos."""
        return list(dict.fromkeys([*self.words, *(photo.word for photo in self.photographs)]))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer, trained on first use."""
        path = self.folder / "tokenizer"
        if not (path / "vocab.json").is_file():
            return captions.train_tokenizer(captions.corpus(self.modules, self.words, list(STYLES)), path)
        return CLIPTokenizer.from_pretrained(path)

    @cached_property
    def compositor(self) -> Compositor:
        """Compositor of all icons."""
        return Compositor(self.icons.rgba, self.surroundings)

    @cached_property
    def drawn(self) -> list[int]:
        """Icons of the generator's concepts."""
        return self.icons.where({*DRAWN, *ALSO_CALLED}, set(STYLES.values()))

    @cached_property
    def others(self) -> list[int]:
        """Icons of other things, as additional training data of the generator."""
        asked = {*DRAWN, *ALSO_CALLED, *KEPT_BACK}
        return self.icons.where({word for word in self.words if word not in asked}, set(STYLES.values()))

    def style(self, icon: int) -> str:
        """Style word of an icon in the generator's sets."""
        return next(word for word, name in STYLES.items() if name == self.icons.sets[icon])

    def caption(self, rng: np.random.Generator, scene: Scene) -> str:
        """Samples a caption of a scene."""
        word = self.icons.words[scene.icon]
        word = ALSO_CALLED.get(word, word) if rng.random() < 0.5 else word
        return captions.caption(rng, word, scene, self.style(scene.icon))

    def full_caption(self, scene: Scene) -> str:
        """The caption with all attributes."""
        return captions.full_caption(self.icons.words[scene.icon], scene, self.style(scene.icon))

    @cached_property
    def _rich(self) -> icon_sets.Pixels:
        seen = [i for i in self.icons.where(sets=set(CLIP_SETS)) if self.icons.words[i] not in KEPT_BACK]
        return augmented_images(np.random.default_rng(5), self.icons.rgba[seen], self.photos, RICH)

    def training_images(self, step: int, n: int) -> icon_sets.Pixels:
        """Training images of the autoencoder: scenes, augmented images, and half real photos if available."""
        rng = np.random.default_rng((7, step))
        real = n // 2 if self.photographs else 0
        rich = (n - real) // 2
        scenes = self.compositor(sample_scenes(rng, self.drawn, n - real - rich))
        shown = [self.photographs[i].pixels for i in rng.integers(len(self.photographs), size=real)] if real else []
        crops = [photo_dataset.crop(rng, pixels, SIDE, least=0.6) for pixels in shown]
        return np.concatenate([scenes, self._rich[rng.integers(len(self._rich), size=rich)], *(c[None] for c in crops)])

    def unseen_images(self, n: int, sets: set[str] | None = None) -> icon_sets.Pixels:
        """Scenes of held-out concepts in the generator's styles or other sets."""
        rows = self.icons.where(set(KEPT_BACK), sets or set(STYLES.values()))
        return self.compositor(sample_scenes(np.random.default_rng(9), rows, n))

    def unseen_style(self, n: int) -> icon_sets.Pixels:
        """Scenes of the held-out icon set."""
        return self.compositor(sample_scenes(np.random.default_rng(10), self.icons.where(sets={UNSEEN_SET}), n))

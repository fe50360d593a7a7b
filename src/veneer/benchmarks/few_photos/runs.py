"""Training runs and generated images of the few-photo benchmark, cached on disk by subject, preset and seed."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from veneer import base_models
from veneer.atomic_files import write_json
from veneer.base_models.devices import resolve_device
from veneer.formats import load_all
from veneer.training import prepare_base
from veneer.training.data.class_images import base_digest
from veneer.training.families import family
from veneer.training.loop.config import preset_steps
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.report.previews import PreviewSettings, previews

from ..shapes import BenchError
from .config import FewPhotosConfig, Subject, TrainingPreset
from .storage import cached


@dataclass(frozen=True)
class ImageSet:
    """Generated images, their file, and the recipe (settings) that determines them."""

    images: list[Image.Image]
    file: Path
    recipe: dict[str, Any]


class Runs:
    """The benchmark's runs, each computed once and cached on disk.

    Args:
        config: of the benchmark. `train`: runs one training, as `veneer personalize` does.

    Attributes:
        prompts: of the images.
    """

    def __init__(self, config: FewPhotosConfig, train: Callable[[PersonalizeConfig], object]) -> None:
        self.config, self.prompts, self._train = config, config.prompt_set(), train

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the base's weights."""
        return base_digest(family(base_models.load(self.config.base)))

    def settings(self, subject: Subject, preset: TrainingPreset, seed: int) -> PersonalizeConfig:
        """The training run, completed with the defaults of the base."""
        given: dict[str, Any] = {"method": self.config.method, **preset.settings, "options": preset.options}
        completed = PersonalizeConfig(
            **given,
            photos=subject.folder,
            concept=subject.concept,
            class_word=subject.word,
            base=self.config.base,
            seed=seed,
            prompts=("a {concept}",),
            eval_seeds=0,
            tracker="none",
            resume=True,
            out=self.folder(subject, preset, seed),
        ).with_defaults()
        if "steps" in preset.settings:
            return completed
        return dataclasses.replace(completed, steps=preset_steps(preset.length, completed.default_steps()))

    def folder(self, subject: Subject, preset: TrainingPreset, seed: int) -> Path:
        """Folder of one run."""
        return self.config.out / subject.name / f"{preset.name}-{seed}"

    def train(self, subject: Subject, preset: TrainingPreset, seed: int) -> dict[str, Any]:
        """Trains one run, or reads its record.

        Returns:
            `steps`, `seconds` of training, `wall_seconds` of the whole command, `parameters`, and the `identity` of its settings.
        Raises:
            BenchError: the folder holds a run with other settings. KeyboardInterrupt: training was stopped; it resumes next time.
        """
        settings = self.settings(subject, preset, seed)
        out = self.folder(subject, preset, seed)
        file, identity = out / "run.json", self._identity(settings, subject)
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if found["identity"] != identity:
                changed = [key for key in identity if found["identity"].get(key) != identity[key]]
                raise BenchError(
                    f"few_photos: {out} has a run with different {', '.join(changed)}; delete it or choose another --out."
                )
            return found
        started = time.perf_counter()
        self._train(settings)
        wall = time.perf_counter() - started
        if not (out / "result.json").is_file():
            raise KeyboardInterrupt
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        training = result["training"]
        record = {
            "identity": identity,
            "steps": training["steps"],
            "seconds": training["seconds"],
            "wall_seconds": None if training["resumed_from"] else wall,
            "parameters": sum(method["parameters"] for method in result["methods"]),
        }
        write_json(file, record)
        return record

    def _identity(self, settings: PersonalizeConfig, subject: Subject) -> dict[str, Any]:
        facts = {
            **settings.identity(),
            "steps": settings.steps,
            "rates": settings.rates(),
            "photos": [photo.digest for photo in subject.photos],
            "base": self.digest,
        }
        found: dict[str, Any] = json.loads(json.dumps(facts, default=str))
        return found

    def trained_images(self, subject: Subject, preset: TrainingPreset, seed: int) -> ImageSet:
        """Images of all prompts with the adapter of a finished run."""
        out, prompts = self.folder(subject, preset, seed), self.prompts
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        texts = [*prompts.alone, *prompts.placed, *prompts.unrelated]
        return self._images(out / "images.npz", texts, seed, subject.concept, record["identity"], out)

    def base_images(self, word: str, seed: int) -> ImageSet:
        """Images of the base without adapters: of prompts alone and placed, with a class word."""
        prompts = self.prompts
        return self._images(self.config.out / "base" / f"{word}-{seed}.npz", [*prompts.alone, *prompts.placed], seed, word)

    def unrelated_images(self, seed: int) -> ImageSet:
        """Images of the base without adapters: of unrelated prompts."""
        return self._images(self.config.out / "base" / f"unrelated prompts-{seed}.npz", self.prompts.unrelated, seed)

    def _images(
        self, file: Path, texts: Sequence[str], seed: int, word: str = "", run: Any = None, adapter: Path | None = None
    ) -> ImageSet:
        """Images of the base, with the adapter of a folder if given; `word` replaces `{concept}`."""
        preset = base_models.preset(self.config.base)
        settings = PreviewSettings(
            self.prompts.seeds(seed), preset.steps, preset.guidance_scale, preset.negative_prompt, batch=self.config.batch
        )
        recipe: dict[str, Any] = {
            "base": self.digest,
            "run": run,
            "prompts": list(texts),
            "word": word,
            "seeds": list(settings.seeds),
            "sampling": [settings.steps, settings.guidance, settings.negative],
        }

        def make() -> np.ndarray:
            pipe = base_models.load(self.config.base).to(resolve_device())
            prepare_base.freeze(pipe)
            if adapter is not None:
                load_all(pipe, adapter)
            made = previews(pipe, texts, settings, {"{concept}": word})
            return np.stack([np.asarray(image.image.convert("RGB")) for image in made])

        return ImageSet([Image.fromarray(pixels) for pixels in cached(file, recipe, make)], file, recipe)

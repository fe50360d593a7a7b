"""Train, generate, score, and write `result.json`, `few-photos.md` and the image grids."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from veneer.atomic_files import write_atomically, write_json
from veneer.training.data.image_io import read_photo
from veneer.training.evaluation.adapter_output import ADAPTER
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.report.artifacts import shrink_to, write_image
from veneer.training.report.metrics import cosine
from veneer.training.report.previews import replace_words

from ..environment import environment
from . import grids, report, scores
from .config import FewPhotosConfig, Subject, TrainingPreset
from .judges import MISSING, judges
from .runs import Runs

PAGE = "few-photos.md"
"""File of the report in the folder of results."""

_log = logging.getLogger(__name__)


def few_photos(config: FewPhotosConfig, train: Callable[[PersonalizeConfig], object]) -> Path:
    """Runs the missing trainings and writes the results.

    Args:
        train: runs one training, as `veneer personalize` does.
    Returns:
        The folder with the results.
    Raises:
        VeneerError: subjects, presets, prompts or the base do not exist, or the folder holds runs with other settings; nothing is
            trained then. KeyboardInterrupt: training was stopped; the same command resumes it.
    """
    runs = Runs(config, train)
    subjects = config.find_subjects(config.subjects)
    gallery = config.find_subjects(config.gallery or config.subjects)
    presets = config.training_presets()
    for preset in presets:
        runs.settings(subjects[0], preset, config.seeds[0])
    done = dict[tuple[str, str, int], dict[str, Any]]()
    for seed in config.seeds:
        for subject in subjects:
            for preset in presets:
                record = runs.train(subject, preset, seed)
                done[subject.name, preset.name, seed] = record
                runs.trained_images(subject, preset, seed)
                steps, seconds = record["steps"], record["seconds"]
                _log.info("%s, %s, seed %d: %d steps, %.0f s", subject.name, preset.name, seed, steps, seconds)
    return Scoring(runs, subjects, gallery, presets).write(done)


class Scoring:
    """Scores of finished runs.

    Args:
        gallery: subjects among which images are identified.
    """

    def __init__(self, runs: Runs, subjects: Sequence[Subject], gallery: Sequence[Subject], presets: Sequence[TrainingPreset]):
        self.runs, self.subjects, self.presets, self.config = runs, subjects, presets, runs.config
        self.judges = judges(self.config.clip, self.config.efficientnet)
        side = min(runs.base_images(subjects[0].word, self.config.seeds[0]).images[0].size)
        small = {s.name: [shrink_to(read_photo(photo.path), side) for photo in s.photos] for s in gallery}
        self.gallery = {j.key: {name: j.photos(photos) for name, photos in small.items()} for j in self.judges}
        self.photos_identified = {key: scores.photos_identified(found) for key, found in self.gallery.items()}

    def write(self, done: Mapping[tuple[str, str, int], dict[str, Any]]) -> Path:
        """Scores all runs; writes `result.json`, `few-photos.md` and the image grids."""
        out, config = self.config.out, self.config
        by_name = {s.name: s for s in self.subjects}
        rows = [
            {"subject": subject, "preset": preset.name, "seed": seed, **self.scores(by_name[subject], preset, seed, record)}
            for preset in self.presets
            for (subject, name, seed), record in done.items()
            if name == preset.name
        ]
        summary = report.summarize(rows)
        names = {j.key: j.features.name for j in self.judges}
        among = list(self.gallery["clip"])
        write_json(
            out / "result.json",
            {
                "environment": environment(),
                "base": {"name": Path(config.base).name, "digest": self.runs.digest},
                "judges": {j.key: {"name": j.features.name, "digest": j.digest} for j in self.judges},
                "presets": {p.name: dataclasses.asdict(p) for p in self.presets},
                "class_words": {s.name: s.word for s in self.subjects},
                "prompts": dataclasses.asdict(self.runs.prompts),
                "gallery": among,
                "photos_identified": self.photos_identified,
                "runs": rows,
                "summary": [_plain(row) for row in summary],
                "matching_answers": grids.matching_answers([s.name for s in self.subjects]),
            },
        )
        facts = [
            f"{len(self.subjects)} subjects, seeds {', '.join(map(str, config.seeds))}, base {Path(config.base).name}. "
            f"An image is identified among {len(among)} subjects (chance {1 / len(among):.0%}) by its nearest photo."
        ]
        write_atomically(out / PAGE, report.page(summary, names, facts).encode())
        self.write_grids()
        if config.efficientnet and len(self.judges) < 2:
            _log.warning("note: %s", MISSING)
        return out

    def scores(self, subject: Subject, preset: TrainingPreset, seed: int, record: Mapping[str, Any]) -> dict[str, Any]:
        """All metrics of one run, by name."""
        prompts, runs = self.runs.prompts, self.runs
        trained, base = runs.trained_images(subject, preset, seed), runs.base_images(subject.word, seed)
        unrelated = runs.unrelated_images(seed)
        found: dict[str, Any] = {key: record[key] for key in ("steps", "seconds", "wall_seconds", "parameters")}
        found["stored_bytes"] = (runs.folder(subject, preset, seed) / ADAPTER).stat().st_size
        features = dict[str, tuple[Tensor, Tensor]]()
        for judge in self.judges:
            of_trained, of_photos = prompts.split(judge.images(trained)), self.gallery[judge.key]
            of_base = (*prompts.split(judge.images(base))[:2], judge.images(unrelated))
            found |= {
                f"{judge.key}.{name}": value
                for name, value in scores.image_scores(subject.name, of_trained, of_base, of_photos).items()
            }
            found[f"{judge.key}.photos_identified"] = self.photos_identified[judge.key][subject.name]
            found[f"{judge.key}.ceiling"] = scores.photo_ceiling(of_photos[subject.name])
            features[judge.key] = of_trained[1], of_base[1]
        asked = prompts.repeated(prompts.placed)
        texts = self._texts([replace_words(prompt, {"{concept}": subject.word}) for prompt in prompts.placed])
        images = {"trained": prompts.split(trained.images)[1], "base": prompts.split(base.images)[1]}
        for side, of_images in zip(("trained", "base"), features["clip"], strict=True):
            found[f"prompt.{side}"] = float(cosine(of_images, texts.repeat_interleave(prompts.images, 0)).mean())
            found[f"contrast.{side}"] = scores.prompt_contrast(of_images, texts)
            found[f"ground.{side}"], found[f"place.{side}"] = scores.obeyed(images[side], asked)
        return found

    def _texts(self, texts: Sequence[str]) -> Tensor:
        found = self.judges[0].features.texts(texts)
        assert found is not None
        return found

    def write_grids(self) -> None:
        """Writes `grid-SUBJECT.png`, and with several subjects `matching-PRESET.png`, of the first seed."""
        seed, out, prompts = self.config.seeds[0], self.config.out, self.runs.prompts
        photos = {s.name: [read_photo(photo.path) for photo in s.photos] for s in self.subjects}
        trained = {
            p.name: {s.name: prompts.split(self.runs.trained_images(s, p, seed).images)[:2] for s in self.subjects}
            for p in self.presets
        }
        for s in self.subjects:
            base = prompts.split(self.runs.base_images(s.word, seed).images)[:2]
            of_subject = {name: found[s.name] for name, found in trained.items()}
            note = f"class word: {s.word}; seed {seed}; base {Path(self.config.base).name}"
            write_image(grids.subject_grid(s.name, photos[s.name], base, of_subject, note), out / f"grid-{s.name}.png")
        for name, found in trained.items():
            if len(found) > 1:
                alone: dict[str, Sequence[Image.Image]] = {subject: images[0] for subject, images in found.items()}
                page = grids.matching_grid(f"few photos, {name}", photos, alone)
                write_image(page, out / f"matching-{name}.png")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for key, value in row.items()}  # type: ignore[arg-type]

"""Batches of labeled images and of images that the models of a method have labeled for each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.atomic_files import write_json
from veneer.injection import Attachment, VeneerError
from veneer.training.loop.disk_space import writing
from veneer.training.loop.seeds import generator

from ..config import TransferConfig
from ..data.run_data import Views
from .batches import Batch, Order

FILE = "pseudo_labels.json"
"""Images and labels of each model, by generation, for a resumed run."""


@dataclass(frozen=True)
class _TrainingSet:
    """Training images of a model: the labeled ones, then those that other models have labeled."""

    order: Order
    images: Sequence[int]
    labels: Sequence[int]


class PseudoLabels:
    """The training batches of a method with generations, after the first one.

    Before the first step of a generation, the models of the one before label all images without labels, and start again.

    Args:
        attached: of the method. `views`: of the run, with images without labels. `steps`, `config`, `folder`: of the run.
        logits: computes logits from images (B, …). `device`: of the model.
    Raises:
        OptionError: too few steps for the generations.
    """

    def __init__(
        self, attached: Attachment, views: Views, steps: int, config: TransferConfig, logits: Callable[[Tensor], Tensor],
        device: torch.device | str, folder: Path,
    ) -> None:  # fmt: skip
        self.attached, self.views, self.seed, self.logits = attached, views, config.seed, logits
        self.batch, self.device, self.file = config.batch, device, folder / FILE
        self.starts = attached.method.generation_starts(steps)
        self.models = attached.method.models_in_turn
        self.generation, self.sets = 0, list[_TrainingSet]()

    def __call__(self, step: int, rows: Sequence[int], samples: int) -> Batch | None:
        """Images and labels of rows of a step, or None in the first generation.

        Args:
            samples: rows of the whole step.
        """
        generation = sum(step >= start for start in self.starts)
        if not generation:
            return None
        start = self.starts[generation - 1]
        if generation != self.generation:
            self.sets = self._begin(generation) if step == start else self._read(generation)
            self.generation = generation
        model = step % self.models
        earlier = sum(other % self.models == model for other in range(start, step))
        return self._load(self.sets[model], [earlier * samples + row for row in rows])

    def _load(self, chosen: _TrainingSet, numbers: Sequence[int]) -> Batch:
        train, unlabeled = self.views.data.splits.train, self.views.unlabeled
        assert unlabeled is not None
        keys = [chosen.order.at(number) for number in numbers]
        labeled = {place: (epoch, train[n]) for place, (epoch, n) in enumerate(keys) if n < len(train)}
        others = {place: (epoch, n - len(train)) for place, (epoch, n) in enumerate(keys) if n >= len(train)}
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        if labeled:
            parts |= zip(labeled, zip(*self.views.train(list(labeled.values())), strict=True), strict=True)
        if others:
            images, _ = unlabeled.loader([(epoch, chosen.images[n]) for epoch, n in others.values()])
            labels = torch.tensor([chosen.labels[n] for _, n in others.values()])
            parts |= zip(others, zip(images, labels, strict=True), strict=True)
        rows = [parts[place] for place in range(len(numbers))]
        return torch.stack([image for image, _ in rows]), torch.stack([label for _, label in rows])

    @torch.no_grad()
    def _begin(self, generation: int) -> list[_TrainingSet]:
        """Labels the images, writes the labels, and starts the models again."""
        examples, unlabeled = self.views.data.source.examples, self.views.unlabeled
        assert unlabeled is not None
        counts = Counter(examples[index].label for index in self.views.data.splits.train)
        logits = []
        for model in range(self.models):
            self.attached.begin_pass(self.seed, model)
            logits.append(torch.cat([self.logits(each.to(self.device)).float().cpu() for each in unlabeled.batches(self.batch)]))
        sets = self.attached.method.training_sets(
            torch.stack(logits), [counts[label] for label in range(logits[0].shape[1])], generation,
            generator(self.seed, "pseudo labels", generation),
        )  # fmt: skip
        self.attached.begin_generation()
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        known[str(generation)] = [{"images": images.tolist(), "labels": labels.tolist()} for images, labels in sets]
        with writing(self.file.parent, FILE):
            write_json(self.file, known)
        return self._sets(generation, known)

    def _read(self, generation: int) -> list[_TrainingSet]:
        """The labels of a generation that a stopped run has begun."""
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        if str(generation) not in known:
            message = f"{self.file}: has no labels of generation {generation}. Start the run again without --resume."
            raise VeneerError(message, file=self.file, where=str(generation), given="missing")
        return self._sets(generation, known)

    def _sets(self, generation: int, known: dict[str, Any]) -> list[_TrainingSet]:
        count = len(self.views.data.splits.train)
        found = []
        for model, entry in enumerate(known[str(generation)]):
            order = Order(
                range(count + len(entry["images"])), generator(self.seed, "generation", generation, model).initial_seed()
            )
            found.append(_TrainingSet(order, entry["images"], entry["labels"]))
        return found


def pseudo_labels(
    attached: Sequence[Attachment], views: Views, steps: int, config: TransferConfig, logits: Callable[[Tensor], Tensor],
    device: torch.device | str, folder: Path,
) -> PseudoLabels | None:  # fmt: skip
    """The batches of the method with generations, or None without one; arguments as of `PseudoLabels`."""
    found = [each for each in attached if each.method.generation_starts(steps)]
    return PseudoLabels(found[0], views, steps, config, logits, device, folder) if found else None

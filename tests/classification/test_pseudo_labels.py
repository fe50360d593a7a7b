"""Batches of the generations of a method: labels of the models before, the models again from zero, and a resumed run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.classification.small import image_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Views, open_data
from veneer.classification.data.unlabeled import read_unlabeled
from veneer.classification.models.loading import open_classifier
from veneer.classification.train.pseudo_labels import FILE, PseudoLabels, pseudo_labels
from veneer.injection import VeneerError, attach
from veneer.testing.case import perturb
from veneer.training.loop.seeds import generator

STEPS, START = 16, 4
"""Half of the steps have labels, in two generations."""


class Case:
    """A CLIP with two patterns, whose deltas are perturbed, and its images."""

    def __init__(self, parent: Path) -> None:
        self.folder = parent
        self.config = TransferConfig(
            data=str(image_folder(parent / "labeled", count=4)),
            model="bundled_clip",
            augment="none",
            batch=4,
            workers=1,
            test=0.25,
        )
        data = open_data(self.config, parent)
        classifier = open_classifier("bundled_clip", data.classes)
        source = read_unlabeled(image_folder(parent / "more", count=5, seed=1))
        self.views = Views(data, classifier.data, "none", workers=1, unlabeled=source)
        self.model: Any = classifier.model
        self.tuned: Any = attach(self.model, "pet", patterns=("{}", "a {}."), generations=2, growth=3.0)
        perturb(self.tuned, size=0.05)
        for _, adapter in self.tuned.parts.values():
            adapter.train()

    def open(self) -> PseudoLabels:
        found = pseudo_labels([self.tuned], self.views, STEPS, self.config, self.model, "cpu", self.folder)
        assert found is not None
        return found

    def images(self) -> list[Tensor]:
        """All images without labels, with the transform of evaluation."""
        assert self.views.unlabeled is not None
        return [*torch.cat(list(self.views.unlabeled.batches(4)))]


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    found = Case(tmp_path)
    yield found
    found.views.close()


def test_labels_of_the_models_before_and_new_models(case: Case) -> None:
    batches = case.open()
    assert batches(START - 1, [0], 4) is None
    assert not (case.folder / FILE).exists()
    with torch.no_grad():
        logits = []
        for model in range(2):
            case.tuned.begin_pass(0, model)
            logits.append(torch.stack([case.model(image[None])[0] for image in case.images()]))
    train = case.views.data.splits.train
    counts = Counter(case.views.data.source.examples[index].label for index in train)
    wanted = case.tuned.method.training_sets(
        torch.stack(logits), [counts[label] for label in range(3)], 1, generator(0, "pseudo labels", 1)
    )
    assert batches(START, [0, 1], 4) is not None
    stored = json.loads((case.folder / FILE).read_text())["1"]
    assert stored == [{"images": images.tolist(), "labels": labels.tolist()} for images, labels in wanted]
    assert stored[0] != stored[1]
    for _, adapter in case.tuned.parts.values():
        assert not hasattr(adapter, "deltas") or not adapter.deltas[:2].any()


def test_an_epoch_of_a_model_has_all_its_images_once(case: Case) -> None:
    """Labeled images with their labels, and others with those of the other model, in turn with the steps of the models."""
    batches, train = case.open(), case.views.data.splits.train
    batches(START, [0], 4)
    stored = json.loads((case.folder / FILE).read_text())["1"]
    examples, more = case.views.data.source.examples, case.images()
    labeled = case.views.plain([(0, index) for index in train])[0]
    for step, model in ((START, 0), (START + 1, 1)):
        size = len(train) + len(stored[model]["images"])
        batch = batches(step, [*range(size)], size)
        assert batch is not None
        pixels = [*labeled, *(more[index] for index in stored[model]["images"])]
        labels = [*(examples[index].label for index in train), *stored[model]["labels"]]
        expected = sorted((float(image.double().sum()), label) for image, label in zip(pixels, labels, strict=True))
        got = sorted((float(image.double().sum()), int(label)) for image, label in zip(*batch, strict=True))
        assert [label for _, label in got] == [label for _, label in expected]
        assert [value for value, _ in got] == pytest.approx([value for value, _ in expected])
        assert size > len(train)
        following = batches(step + 2, [*range(size)], size)
        assert following is not None
        assert not torch.equal(following[0], batch[0])
    first, second = (batches(START, rows, 6) for rows in ([0, 1, 2, 3, 4, 5], [4, 1]))
    assert first is not None
    assert second is not None
    assert torch.equal(first[0][[4, 1]], second[0])


def test_a_resumed_run_reads_the_labels(case: Case) -> None:
    batches = case.open()
    batches(START, [0], 4)
    perturb(case.tuned, size=0.05)
    again = case.open()
    for step in (START + 1, START + 2):
        first, second = (each(step, [0, 1, 2, 3], 4) for each in (batches, again))
        assert first is not None
        assert second is not None
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert any(adapter.deltas[:2].any() for _, adapter in case.tuned.parts.values() if hasattr(adapter, "deltas"))
    (case.folder / FILE).unlink()
    with raises(VeneerError, file=case.folder / FILE, where="1"):
        case.open()(START + 1, [0], 4)


def test_methods_without_generations(case: Case) -> None:
    case.tuned.detach()
    plain = attach(case.model, "pet", patterns=("{}", "a {}."))
    assert pseudo_labels([plain], case.views, STEPS, case.config, case.model, "cpu", case.folder) is None

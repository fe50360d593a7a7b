"""Successive halving against hand-computed rounds and ranks, and a search that diverges, stops and resumes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.classification.small import image_folder, model_folder
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Views, open_data
from veneer.classification.models.loading import open_classifier
from veneer.classification.train import hyperparameter_search
from veneer.classification.train.hyperparameter_search import candidates, read_search, search_hyperparameters
from veneer.classification.train.successive_halving import Score, best, rank, round_sizes, round_steps
from veneer.training.loop.trainer import Trainer


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (2, [2]), (3, [3, 2]), (5, [5, 3, 2]), (7, [7, 4, 2]), (8, [8, 4, 2]), (9, [9, 5, 3, 2])]
)
def test_rounds_halve_the_candidates(count: int, sizes: list[int]) -> None:
    assert round_sizes(count) == sizes


@pytest.mark.parametrize("count", [1, 3, 7, 8, 20])
def test_rounds_stay_within_the_budget_and_share_it(count: int) -> None:
    budget = 100 * count
    spent = [size * steps for size, steps in zip(round_sizes(count), round_steps(count, budget), strict=True)]
    assert sum(spent) <= budget
    assert min(spent) > budget / len(spent) - count
    assert round_steps(count, 1) == [1] * len(spent)


def test_rank_gives_ties_within_a_standard_error_to_the_highest_rate() -> None:
    # √(0.5 · 0.5 / 100) = 0.05: 0.45 is tied with 0.5, 0.44 is not
    scores = [Score(0.50, 1.5, 0.001), Score(0.45, 1.8, 0.01), Score(0.44, 1.0, 0.1), Score(0.10, 9.0, 1.0)]
    assert rank(scores, 100) == [1, 0, 2, 3]
    assert rank(scores[1:], 100) == [1, 0, 2], "0.44 is tied with 0.45"
    assert rank(scores, 10_000) == [0, 1, 2, 3], "with a standard error of 0.005 there are no ties"


def test_the_last_round_is_decided_by_accuracy_then_loss() -> None:
    assert best([Score(0.49, 1.0, 0.1), Score(0.50, 1.5, 0.001), Score(0.50, 1.4, 0.001)]) == 2
    assert best([Score(0.50, 1.0, 0.001), Score(0.50, 1.0, 0.1)]) == 0


def test_rank_prefers_the_lower_loss_at_equal_rates() -> None:
    assert rank([Score(0.5, 1.5, 0.01), Score(0.5, 1.2, 0.01), Score(0.2, 1.0, 0.01)], 100) == [1, 0, 2]


def test_rank_puts_diverged_candidates_last() -> None:
    diverged = Score(0.0, math.inf, 0.1)
    assert rank([diverged, Score(0.0, 2.0, 0.001), Score(0.0, 3.0, 0.01)], 100) == [2, 1, 0]


def test_candidates_are_rates_of_three_decades_then_scales() -> None:
    found = candidates(TransferConfig(method="adaptformer", search=8))
    assert [f.rate() for f in found] == pytest.approx([1e-3, 3e-3, 3e-4, 1e-2, 1e-4, 3e-2, 3e-5, 1e-3])
    assert [dict(f.options) for f in found] == [{}] * 7 + [{"adaptformer": {"scale": 1.0}}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A config, a classifier and its views."""
    folder = tmp_path_factory.mktemp("search")
    data, model = image_folder(folder / "images", count=16), model_folder(folder, "vit")
    config = TransferConfig(
        data=str(data), model=str(model), out=folder, method="lora", search=3, search_epochs=2, batch=8, augment="none", workers=1
    )
    images = open_data(config, folder)
    classifier = open_classifier(config.model, images.classes)
    with Views(images, classifier.data, "none", workers=1) as views:
        yield config, classifier, views


def _search(run: Any, out: Path, **options: Any) -> TransferConfig:
    config, classifier, views = run
    return search_hyperparameters(dataclasses.replace(config, **options), classifier, views, out, Accelerator(cpu=True))


def test_a_search_does_not_use_the_test_split(run: Any, tmp_path: Path) -> None:
    config, classifier, views = run
    images = views.data.source.examples
    test = {images[i].name for i in views.data.splits.test}
    assert test
    read: set[str] = set()
    content = type(views.data.source).read

    def recording(source: Any, example: Any) -> Any:
        read.add(example.name)
        return content(source, example)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(views.data.source), "read", recording)
        with Views(views.data, classifier.data, "none", workers=1) as fresh:
            search_hyperparameters(config, classifier, fresh, tmp_path, Accelerator(cpu=True))
    assert len(read) == len(images) - len(test)
    assert not read & test


def test_a_diverging_candidate_loses(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = 1e-3
    step = Trainer._train_step

    def exploding(self: Any) -> Any:
        if self.config.learning_rate > rate:
            with torch.no_grad():
                self.parameters[0].fill_(float("nan"))
        return step(self)

    monkeypatch.setattr(Trainer, "_train_step", exploding)
    chosen = _search(run, tmp_path, learning_rate=rate)
    trials = read_search(tmp_path)
    assert [t["val_accuracy"] is None for t in trials] == [False, True, False, False, False]
    assert {t["learning_rate"] for t in trials[3:]} == {rate, 0.3 * rate}
    last = max(trials[3:], key=lambda t: (t["val_accuracy"], -t["val_loss"]))
    assert chosen.rate() == last["learning_rate"]


def test_a_resumed_search_reuses_its_trials(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _search(run, tmp_path)
    trials = read_search(tmp_path)
    assert [t["round"] for t in trials] == [1, 1, 1, 2, 2]
    (tmp_path / "search.json").write_text(json.dumps(trials[:3]))
    trained: list[float] = []
    train = hyperparameter_search.ClassifierTrainer.train

    def counted(self: Any) -> Any:
        trained.append(self.config.rate())
        return train(self)

    monkeypatch.setattr(hyperparameter_search.ClassifierTrainer, "train", counted)
    assert _search(run, tmp_path, resume=True) == dataclasses.replace(whole, resume=True)
    assert len(trained) == 2
    assert read_search(tmp_path) == trials
    trained.clear()
    _search(run, tmp_path, resume=True, search_epochs=3)
    assert len(trained) == 5, "trials of another length are not reused"
    before = [trial["settings"] for trial in read_search(tmp_path)]
    for options in ({"seed": 1}, {"weight_decay": 0.1}):
        trained.clear()
        _search(run, tmp_path, resume=True, search_epochs=3, **options)
        assert len(trained) == 5, "trials of other options are not reused"
    _, _, views = run
    splits = dataclasses.replace(views.data.splits, digest="other")
    monkeypatch.setattr(views, "data", dataclasses.replace(views.data, splits=splits))
    trained.clear()
    _search(run, tmp_path, resume=True, search_epochs=3)
    assert len(trained) == 5, "trials of other splits are not reused"
    assert not {*before} & {trial["settings"] for trial in read_search(tmp_path)}


def test_a_dry_run_has_no_search(run: Any, tmp_path: Path) -> None:
    assert _search(run, tmp_path, dry_run=True).learning_rate is None
    assert not (tmp_path / "search.json").exists()


def test_mixup_has_no_cached_features(run: Any, tmp_path: Path) -> None:
    for mixup, count in ((0.0, 7), (0.2, 2)):
        _search(run, tmp_path / str(mixup), method="linear_probe", search=2, search_epochs=1, mixup=mixup)
        assert len([t for t in read_search(tmp_path / str(mixup)) if t["round"] == 1]) == count

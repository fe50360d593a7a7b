"""A fresh head starts at the logistic regression on the frozen features, and only where that means something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn.functional import linear

from tests.classification.small import CLASSES, model_folder, picture_folder
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Views, open_data
from veneer.classification.models.linear_probe_init import PENALTIES, solve_head
from veneer.classification.models.loading import open_classifier
from veneer.classification.train.train import Teacher, attach_methods


def draw(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = generator.integers(0, 4, count)
    centres = np.array([[2, 0, 1, 0, 0], [0, 2, 0, 1, 0], [1, 1, 0, 0, 2], [0, 0, 2, 2, 0]])
    return centres[labels] + generator.normal(0, 1.2, (count, 5)) + 7, labels


def test_the_head_is_the_logistic_regression_that_validation_chooses() -> None:
    generator = np.random.default_rng(3)
    (x, y), (held_x, held_y), (new, _) = (draw(n, generator) for n in (120, 60, 40))
    weight, bias = solve_head(*((torch.tensor(a), torch.tensor(b)) for a, b in ((x, y), (held_x, held_y))), classes=4)
    centre = x.mean(axis=0)
    length = np.sqrt(np.square(x - centre).sum(axis=1).mean())
    least, expected = np.inf, np.empty(0)
    for penalty in PENALTIES:
        peer = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-9, max_iter=10_000).fit((x - centre) / length, y)
        loss = log_loss(held_y, peer.predict_proba((held_x - centre) / length))
        if loss < least:
            least, expected = loss, peer.predict_proba((new - centre) / length)
    found = linear(torch.tensor(new), weight, bias).softmax(dim=1).numpy()
    assert PENALTIES[0] > 1 / 1200, "the strongest is stronger than the usual C of 1"
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    parent = tmp_path_factory.mktemp("first_head")
    return picture_folder(parent / "pictures"), model_folder(parent, "vit")


@pytest.mark.parametrize("method", ["lora", "full", "linear_probe", "vpt+ssf"])
def test_training_begins_where_a_probe_ends(folders: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    teacher = begun(folders, tmp_path, method)
    base = {name: value.clone() for name, value in teacher.model.state_dict().items() if "head" in name and "seam" not in name}
    teacher._see()
    features = teacher._seen
    train, held = (features([(0, i) for i in getattr(teacher.views.data.splits, s)]) for s in ("train", "validation"))
    weight, bias = solve_head(train, held, len(CLASSES))
    for attachment in teacher.attached[:-1]:
        attachment.detach()  # leaves the head
    pixels, _ = next(iter(teacher.views.batches("validation", 32)))
    with torch.no_grad():
        torch.testing.assert_close(teacher.model.eval()(pixels), linear(held[0], weight, bias), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, teacher.model.state_dict()[name]) for name, value in base.items()), "the base's own head"


@pytest.mark.parametrize("options", [{"lp_ft": False}, {"weights": "none"}])
def test_a_head_starts_anew_where_that_is_wanted_or_features_say_nothing(
    folders: tuple[Path, Path], tmp_path: Path, options: dict[str, object]
) -> None:
    teacher = begun(folders, tmp_path, "lora", **options)
    assert not teacher.starts_head
    before = {name: value.clone() for name, value in teacher.named.items()}
    teacher._see()
    assert all(torch.equal(value, before[name]) for name, value in teacher.named.items())


def begun(folders: tuple[Path, Path], out: Path, method: str, **options: object) -> Teacher:
    pictures, model = folders
    options = {"lp_ft": True, **options}
    config = TransferConfig(data=str(pictures), model=str(model), method=method, validation=0.25, batch=8, out=out, **options)  # type: ignore[arg-type]
    data = open_data(config, out)
    classifier = open_classifier(config.model, data.classes, weights=config.weights)
    attached = attach_methods(classifier, config, data)
    views = Views(data, classifier.data, "none")
    return Teacher(classifier, attached, views, config, out, Accelerator(cpu=True))

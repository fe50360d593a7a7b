"""Initialization of a fresh head with the linear probe of the frozen features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn.functional import linear

from tests.classification.small import CLASSES, image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Views, open_data
from veneer.classification.models.linear_probe_init import PENALTIES, solve_head
from veneer.classification.models.loading import open_classifier
from veneer.classification.train.attach_methods import attach_methods
from veneer.classification.train.train import ClassifierTrainer
from veneer.injection.errors import OptionError


def draw(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = generator.integers(0, 4, count)
    centers = np.array([[2, 0, 1, 0, 0], [0, 2, 0, 1, 0], [1, 1, 0, 0, 2], [0, 0, 2, 2, 0]])
    return centers[labels] + generator.normal(0, 1.2, (count, 5)) + 7, labels


def test_solve_head_matches_scikit_learn_logistic_regression() -> None:
    generator = np.random.default_rng(3)
    (x, y), (val_x, val_y), (new, _) = (draw(n, generator) for n in (120, 60, 40))
    weight, bias = solve_head(*((torch.tensor(a), torch.tensor(b)) for a, b in ((x, y), (val_x, val_y))), classes=4)
    center = x.mean(axis=0)
    length = np.sqrt(np.square(x - center).sum(axis=1).mean())
    least, expected = np.inf, np.empty(0)
    for penalty in PENALTIES:
        peer = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-9, max_iter=10_000).fit((x - center) / length, y)
        loss = log_loss(val_y, peer.predict_proba((val_x - center) / length))
        if loss < least:
            least, expected = loss, peer.predict_proba((new - center) / length)
    found = linear(torch.tensor(new), weight, bias).softmax(dim=1).numpy()
    assert PENALTIES[0] > 1 / 1200, "the strongest penalty is stronger than scikit-learn's default C = 1"
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    parent = tmp_path_factory.mktemp("first_head")
    return image_folder(parent / "pictures"), model_folder(parent, "vit")


@pytest.mark.parametrize("method", ["lora", "full", "linear_probe", "vpt+ssf"])
def test_head_is_initialized_with_the_linear_probe(folders: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    trainer = make_trainer(folders, tmp_path, method)
    base = {name: value.clone() for name, value in trainer.model.state_dict().items() if "head" in name and "seam" not in name}
    trainer._init_inputs()
    features = trainer._frozen
    train, held = (features([(0, i) for i in getattr(trainer.views.data.splits, s)]) for s in ("train", "validation"))
    weight, bias = solve_head(train, held, len(CLASSES))
    for attachment in trainer.attached[:-1]:
        attachment.detach()  # keeps the head's attachment
    pixels, _ = next(iter(trainer.views.batches("validation", 32)))
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(pixels), linear(held[0], weight, bias), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in base.items()), "the base's own head"


@pytest.mark.parametrize("options", [{"lp_ft": False}, {"weights": "none"}])
def test_head_is_random_without_lp_ft_or_pretrained_weights(
    folders: tuple[Path, Path], tmp_path: Path, options: dict[str, object]
) -> None:
    trainer = make_trainer(folders, tmp_path, "lora", **options)
    assert not trainer.uses_probe_init
    before = {name: value.clone() for name, value in trainer.named.items()}
    trainer._init_inputs()
    assert all(torch.equal(value, before[name]) for name, value in trainer.named.items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"learning_rate": 0.1}, 0.001),  # the head is solved
        ({"learning_rate": 1e-4}, 1e-4),
        ({"learning_rate": 0.1, "lp_ft": False}, 0.1),
        ({"learning_rate": 0.1, "head_learning_rate": 0.02}, 0.02),
    ],
)
def test_learning_rate_of_a_head_beside_the_method(
    folders: tuple[Path, Path], tmp_path: Path, options: dict[str, float], expected: float
) -> None:
    trainer = make_trainer(folders, tmp_path, "vpt", **options)
    (head,) = (a for a in trainer.attached if a.method.name == "linear_probe")
    rates = {id(p): options["learning_rate"] * group["lr_scale"] for group in trainer._groups() for p in group["params"]}
    assert [rates[id(p)] for p in head.parameters()] == pytest.approx([expected] * 2)
    assert {rates[id(p)] for p in trainer.attached[0].parameters()} == {options["learning_rate"]}


def test_a_random_model_has_no_solved_head(folders: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = make_trainer(folders, tmp_path, "vpt", learning_rate=0.1, weights="none")
    assert {group["lr_scale"] for group in trainer._groups()} == {1.0}


@pytest.mark.parametrize("method", ["linear_probe", "full"])
def test_learning_rate_of_a_head_that_no_one_trains_is_an_error(folders: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    """Before training, so that a dry run raises it too."""
    with raises(OptionError, option="head_learning_rate", given=0.02):
        make_trainer(folders, tmp_path, method, head_learning_rate=0.02)


def make_trainer(folders: tuple[Path, Path], out: Path, method: str, **options: object) -> ClassifierTrainer:
    images, model = folders
    options = {"lp_ft": True, **options}
    config = TransferConfig(data=str(images), model=str(model), method=method, validation=0.25, batch=8, out=out, **options)  # type: ignore[arg-type]
    data = open_data(config, out)
    classifier = open_classifier(config.model, data.classes, weights=config.weights)
    attached = attach_methods(classifier, config, data)
    views = Views(data, classifier.data, "none")
    return ClassifierTrainer(classifier, attached, views, config, out, Accelerator(cpu=True))

"""The supernet: slices of its weights, their gradients, and a model that is the same afterwards."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from tests.classification.search.tiny_space import METHODS, tiny_sites
from tests.classification.small import image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Views, open_data
from veneer.classification.models.classifier import Classifier
from veneer.classification.models.loading import open_classifier
from veneer.classification.search.block_sites import BlockSites
from veneer.classification.search.block_spaces import PrefixSpace
from veneer.classification.search.search_methods import parse_methods
from veneer.classification.search.sub_network import SubNetwork
from veneer.classification.search.sub_network_config import config_of
from veneer.classification.search.supernet import Supernet, check_supernet
from veneer.classification.train.attach_methods import attach_methods
from veneer.injection import methods
from veneer.injection.attachment.attach import attachments
from veneer.injection.attachment.model_state import statistics
from veneer.injection.errors import OptionError
from veneer.training import param_groups
from veneer.training.loop.checkpoints import CheckpointError

SUB = SubNetwork(((2, 0), (4, 1), (1, 2)))


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Views, Classifier, TransferConfig]]:
    folder = tmp_path_factory.mktemp("supernet")
    base = TransferConfig(
        data=str(image_folder(folder / "images", 6)), model=str(model_folder(folder, "vit")), validation=0.3, test=0.2, batch=4,
        epochs=2, cache=False, workers=1,
    )  # fmt: skip
    data = open_data(base, folder)
    classifier = open_classifier(base.model, data.classes, seed=0)
    with Views(data, classifier.data, base.augment, workers=1) as views:
        yield views, classifier, base


def build(views: tuple[Views, Classifier, TransferConfig], folder: Path, sizes: tuple[int, ...] = (1, 2, 4)) -> Supernet:
    images, classifier, base = views
    sites = BlockSites(classifier.model, parse_methods(METHODS, sizes))
    supernet = Supernet(base, classifier, images, PrefixSpace(sites, 10**6), folder, Accelerator(cpu=True))
    with torch.no_grad():
        for number, weight in enumerate(supernet.weights.values()):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    return supernet


def slices(weights: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Leading slices of weights."""
    return {name: weights[name][tuple(slice(n) for n in shape)] for name, shape in shapes.items()}


def explicit(supernet: Supernet, sub: SubNetwork, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of their sum of squares, of a sub-network that is attached with copies of the slices."""
    config = config_of(supernet.base, supernet.space.sites, sub)
    attached = attach_methods(supernet.classifier, config, supernet.views.data)
    parameters = param_groups.named_parameters(attached)
    copies = slices(dict(supernet.weights), {name: p.shape for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(copies[name])
    logits = supernet.model.eval()(pixels)
    logits.square().sum().backward()
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for attachment in reversed(attached):
        attachment.detach()
    return logits.detach(), gradients


@pytest.mark.parametrize("sub", [SUB, SubNetwork(((4, 4), (4, 4), (4, 4))), SubNetwork(((0, 0), (0, 0), (0, 1)))])
def test_a_sub_network_is_an_attached_one_with_slices_of_the_weights(
    sub: SubNetwork, views: tuple[Views, Classifier, TransferConfig], tmp_path: Path
) -> None:
    """The gradient of a weight is that of its slice, with zeros for the rest."""
    supernet = build(views, tmp_path)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    expected, gradients = explicit(supernet, sub, pixels)
    with supernet.sub_network(sub, training=True):
        logits = supernet.model.eval()(pixels)
    logits.square().sum().backward()
    assert torch.equal(logits, expected)
    assert {name for name, weight in supernet.weights.items() if weight.grad is not None} == {*gradients}
    for name, gradient in gradients.items():
        whole = torch.zeros_like(supernet.weights[name])
        whole[tuple(slice(n) for n in gradient.shape)] = gradient
        assert torch.equal(supernet.weights[name].grad, whole)  # type: ignore[arg-type]


def test_evaluation_reads_changed_weights_and_adds_no_gradient(
    views: tuple[Views, Classifier, TransferConfig], tmp_path: Path
) -> None:
    supernet = build(views, tmp_path)
    before = supernet.evaluate(SUB)
    assert supernet.evaluate(SUB) == before
    with torch.no_grad():
        for weight in supernet.weights.values():
            weight.mul_(1.5)
    assert supernet.evaluate(SUB)[1] != before[1]
    assert all(weight.grad is None for weight in supernet.weights.values())


def test_parameters_that_are_not_slices_are_rejected(views: tuple[Views, Classifier, TransferConfig], tmp_path: Path) -> None:
    """One dimension is larger, or the name is missing in the largest sub-network; the model stays as it is."""
    supernet = build(views, tmp_path)
    name = next(name for name, weight in supernet.weights.items() if weight.ndim == 2 and name.startswith("lora/"))
    shape = tuple(supernet.weights[name].shape)
    for whole in (supernet.weights[name][:1, :1].detach(), None):
        supernet.weights.pop(name)
        supernet.weights |= {} if whole is None else {name: whole}
        expected = None if whole is None else (1, 1)
        with (
            raises(OptionError, option="methods", where=name, given=shape, expected=expected),
            supernet.sub_network(SubNetwork(((4, 4), (0, 0), (0, 0))), training=True),
        ):
            pass
        assert attachments(views[1].model) == []


def test_a_supernet_with_other_sizes_does_not_continue_the_training(
    views: tuple[Views, Classifier, TransferConfig], tmp_path: Path
) -> None:
    """Its largest sub-network is the same, but its steps sample others."""
    build(views, tmp_path).fit()
    with raises(CheckpointError, where="settings", given={"sizes": [[1, 2, 4]] * 3}, expected={"sizes": [[1, 4]] * 3}):
        build(views, tmp_path, sizes=(1, 4)).fit()


@pytest.mark.parametrize(("weights", "same"), [("random", False), ("published", False), ("3f0c", True)])
def test_a_supernet_of_another_model_does_not_continue_the_training(
    weights: str, same: bool, views: tuple[Views, Classifier, TransferConfig], tmp_path: Path
) -> None:
    """Without a hash of the weights, the models are compared by name; with one, the file may have moved."""
    images, classifier, base = views
    other = dataclasses.replace(classifier, weights=weights)
    moved = dataclasses.replace(other, name="vit_other")
    build((images, other, base), tmp_path).fit()
    if same:
        build((images, moved, base), tmp_path).fit()
        return
    with raises(CheckpointError, where="settings", given={"model": classifier.name}, expected={"model": "vit_other"}):
        build((images, moved, base), tmp_path).fit()


def test_the_model_is_the_same_after_training_and_weights_are_not(
    views: tuple[Views, Classifier, TransferConfig], tmp_path: Path
) -> None:
    """A second supernet has the same weights, and one with another seed has others."""
    state = {name: tensor.clone() for name, tensor in views[1].model.state_dict().items()}
    trained = []
    for number in range(2):
        supernet = build(views, tmp_path / str(number))
        before = {name: weight.detach().clone() for name, weight in supernet.weights.items()}
        supernet.fit()
        assert not any(torch.equal(weight, before[name]) for name, weight in supernet.weights.items())
        trained.append(supernet.weights)
    assert attachments(views[1].model) == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in views[1].model.state_dict().items())
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


def test_batch_norm_statistics_of_random_weights_are_trained(tmp_path: Path) -> None:
    """They stay when a sub-network is detached, and an evaluation does not change them."""
    data_folder, model = image_folder(tmp_path / "images", 6), model_folder(tmp_path, "coatnet")
    base = TransferConfig(data=str(data_folder), model=str(model), weights="none", validation=0.3, test=0.2, batch=4, cache=False)
    data = open_data(base, tmp_path)
    classifier = open_classifier(base.model, data.classes, weights="none", seed=0)
    sub = SubNetwork(((0, 1),))
    with Views(data, classifier.data, base.augment, workers=1) as images:
        sites = BlockSites(classifier.model, parse_methods("lora", (1, 2)))
        supernet = Supernet(base, classifier, images, PrefixSpace(sites, 10**6), tmp_path / "run", Accelerator(cpu=True))
        before = {name: buffer.clone() for name, buffer in statistics(classifier.model.named_modules())}
        supernet.model.train()
        with supernet.sub_network(sub, training=True):
            supernet.model(torch.randn(4, 3, 32, 32))
        trained = {name: buffer.clone() for name, buffer in statistics(classifier.model.named_modules())}
        supernet.evaluate(sub)
    assert trained.keys() == before.keys()
    assert not any(torch.equal(value, before[name]) for name, value in trained.items())
    assert all(torch.equal(value, trained[name]) for name, value in statistics(classifier.model.named_modules()))


def test_steps_sample_different_sub_networks(views: tuple[Views, Classifier, TransferConfig], tmp_path: Path) -> None:
    supernet = build(views, tmp_path)
    samples = [supernet.sample(step) for step in range(30)]
    assert samples == [supernet.sample(step) for step in range(30)]
    assert len({*samples}) > 20
    assert not any(sub.is_empty for sub in samples)


def test_attaching_keeps_the_random_state_of_dropout(views: tuple[Views, Classifier, TransferConfig], tmp_path: Path) -> None:
    supernet = build(views, tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with supernet.sub_network(SUB, training=True):
        assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("name", "hooks"), [("adalora", ("penalty", "after_step")), ("tip_adapter", ("prepares",))])
def test_methods_that_take_part_in_training_are_rejected(name: str, hooks: tuple[str, ...]) -> None:
    with raises(OptionError, option="methods", method=name, given=hooks):
        check_supernet([methods.get("lora")(), methods.get(name)()])


def test_random_sub_networks_of_any_state_are_within_the_largest() -> None:
    space = PrefixSpace(tiny_sites(), 10**6)
    rng = random.Random(0)
    largest = space.largest()
    for _ in range(20):
        pairs = zip(space.sample_any(rng).sizes, largest.sizes, strict=True)
        assert all(size <= most for row, limits in pairs for size, most in zip(row, limits, strict=True))

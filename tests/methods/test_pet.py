"""PET against a CLIP for each pattern, with its biases and prompts written out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.classifiers import InOrder, cosines, encode, labeled_batches, large, pictures, row, tiny, token
from tests.methods.test_coop import END, SIDES, START
from tests.raising import raises
from veneer.classification.train.batches import ClassifyingLoss
from veneer.formats import load
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.injection.registry import hosts
from veneer.injection.sites import ParamSite
from veneer.methods.prompt.class_prompts.pet import PET
from veneer.testing.case import perturb
from veneer.training.objective.forward_passes import ForwardPasses

PATTERNS = ("{}", "a photo of {}.")
PROMPTS: tuple[dict[str, list[tuple[str, ...]]], ...] = (
    {"toy cat": [("toy", "cat")], "dog": [("puppy",), ("hound",)], "red car": [("red", "car")]},
    {
        "toy cat": [("a", "photo", "of", "toy", "cat", ".")],
        "dog": [("a", "photo", "of", "puppy", "."), ("a", "photo", "of", "hound", ".")],
        "red car": [("a", "photo", "of", "red", "car", ".")],
    },
)
OPTIONS: dict[str, Any] = {"patterns": PATTERNS, "label_words": {"dog": "puppy|hound"}, "temperature": 3.0}


def train(tuned: Any) -> None:
    """Training mode of the adapters alone, as in a run."""
    for _, adapter in tuned.parts.values():
        adapter.train()


def with_biases(model: Any, tuned: Any, index: int) -> Any:
    """A CLIP with the deltas of one model in its biases."""
    explicit = copy.deepcopy(model)
    with torch.no_grad():
        for site, adapter in tuned.parts.values():
            if isinstance(site, ParamSite):
                bias = explicit.get_submodule(site.path).get_parameter(site.param)
                bias[slice(*site.rows) if site.rows else ...] += adapter.deltas[index]
    return explicit


def class_weights(model: Any, prompts: dict[str, list[tuple[str, ...]]]) -> list[Tensor]:
    weights = []
    for several in prompts.values():
        features = [encode(model.clip, row(model.clip, [START, *map(token, words), END]), len(words) + 1) for words in several]
        mean = torch.stack(features).mean(0)
        weights.append(mean / mean.norm())
    return weights


def logits(model: Any, image: Tensor, patterns: tuple[int, ...]) -> Tensor:
    by_pattern = [class_weights(model, PROMPTS[i]) for i in patterns]
    return cosines(model, image, [torch.stack(several).mean(0) for several in zip(*by_pattern, strict=True)])


def gradients(tuned: Any) -> dict[str, Tensor]:
    return {name: adapter.deltas.grad for name, (site, adapter) in tuned.parts.items() if isinstance(site, ParamSite)}


def bias_gradients(explicit: Any, tuned: Any) -> dict[str, Tensor]:
    found = {}
    for name, (site, adapter) in tuned.parts.items():
        if isinstance(site, ParamSite):
            grad = explicit.get_submodule(site.path).get_parameter(site.param).grad
            found[name] = torch.zeros_like(adapter.deltas[0]) if grad is None else grad[slice(*site.rows) if site.rows else ...]
    return found


@pytest.mark.parametrize("key", list(SIDES))
def test_each_pattern_trains_its_own_model(key: str) -> None:
    bare, image = tiny(key), pictures(SIDES[key])
    model = copy.deepcopy(bare)
    tuned = attach(model, "pet", **OPTIONS)
    perturb(tuned, size=0.3)
    train(tuned)
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    for step in (2, 3):
        tuned.begin_pass(0, step)
        explicit = with_biases(bare, tuned, step % 2)
        got, wanted = model(image), logits(explicit, image, (step % 2,))
        torch.testing.assert_close(got, wanted)
        for _, adapter in tuned.parts.values():
            adapter.zero_grad()
        (got * weight).sum().backward()
        (wanted * weight).sum().backward()
        expected = bias_gradients(explicit, tuned)
        for name, grad in gradients(tuned).items():
            torch.testing.assert_close(grad[step % 2], expected[name], msg=name)
            assert not grad[[i for i in range(3) if i != step % 2]].any()


def test_distillation_from_the_mean_of_the_patterns() -> None:
    bare, image = tiny(), pictures(count=3)
    model = copy.deepcopy(bare)
    tuned = attach(model, "pet", **OPTIONS, labeled_share=0.5)
    perturb(tuned, size=0.3)
    train(tuned)
    assert tuned.unlabeled_passes() == 0
    tuned.after_step(1, 4)
    assert tuned.unlabeled_passes() == 0
    tuned.after_step(2, 4)
    assert tuned.unlabeled_passes() == 3
    explicit = with_biases(bare, tuned, 2)
    with torch.no_grad():
        teachers = [logits(with_biases(bare, tuned, i), image, (i,)) for i in range(2)]
    target = ((teachers[0] + teachers[1]) / 2 / 3).softmax(-1)
    student = (logits(explicit, image, (0, 1)) / 3).softmax(-1)
    wanted = 9 * (target * (target / student).log()).sum(-1).mean()
    got = ForwardPasses([tuned]).without_labels(2, lambda _: model(image))
    assert got is not None
    torch.testing.assert_close(got, wanted)
    got.backward()
    wanted.backward()
    expected = bias_gradients(explicit, tuned)
    for name, grad in gradients(tuned).items():
        torch.testing.assert_close(grad[2], expected[name], msg=name)
        assert not grad[:2].any()


def test_a_step_has_labels_or_none() -> None:
    """The labeled batch in the first part, the unlabeled one in the second."""
    model, image, others = tiny(), pictures(count=4), pictures(count=6).flip(0)
    tuned = attach(model, "pet", **OPTIONS)
    train(tuned)
    labels = torch.tensor([0, 1, 2, 0])
    read = []

    def unlabeled(step: int, rows: list[int], samples: int, view: int) -> Tensor:
        read.append((step, rows, samples, view))
        return others[rows]

    loss = ClassifyingLoss(
        model, labeled_batches(image, labels), InOrder(), 2, passes=ForwardPasses([tuned]), unlabeled=unlabeled
    )
    first = loss(1, [0, 1])
    assert read == []
    tuned.begin_pass(0, 1)
    torch.testing.assert_close(first, F.cross_entropy(model(image[2:]).float(), labels[2:]))
    tuned.after_step(1, 2)
    second = loss(1, [0, 1])
    assert read == [(1, [0, 1], 2, 0)]
    passes = ForwardPasses([tuned]).without_labels(1, lambda _: model(others[:2]).float())
    torch.testing.assert_close(second, passes)
    assert second < first


def test_evaluation_and_the_file_have_the_distilled_model(tmp_path: Any) -> None:
    bare, image = tiny(), pictures()
    model = copy.deepcopy(bare)
    tuned = attach(model, "pet", **OPTIONS)
    perturb(tuned, size=0.3)
    wanted = logits(with_biases(bare, tuned, 2), image, (0, 1))
    torch.testing.assert_close(model(image), wanted)
    for _ in range(2):
        tuned.finalize()
        torch.testing.assert_close(model(image), wanted)
    assert tuned.report().trainable == attach(tiny(), "bitfit", where="bias text/bias").report().trainable
    other = tiny()
    load(other, tuned.save(tmp_path / "distilled"))
    torch.testing.assert_close(other(image), wanted)


def test_a_resumed_run_is_in_the_same_part() -> None:
    tuned, other = (attach(tiny(), "pet", **OPTIONS) for _ in range(2))
    tuned.after_step(3, 4)
    part = tuned.parts["head.prompts"][1]
    assert part.training_buffers == ("distills",)
    other.parts["head.prompts"][1].distills.copy_(part.distills)
    assert other.unlabeled_passes() == tuned.unlabeled_passes() == 3


def test_count() -> None:
    tuned = attach(large("ViT-B-16"), "pet")
    assert tuned.report().trainable == 5 * 171_008 == 855_040
    tuned.finalize()
    assert tuned.report().trainable == 171_008


@pytest.mark.parametrize(
    ("option", "value", "given"),
    [
        ("patterns", (), ()),
        ("patterns", ("a photo",), "a photo"),
        ("labeled_share", 0.0, 0.0),
        ("labeled_share", 1.0, 1.0),
        ("temperature", 0.0, 0.0),
        ("label_words", {"dog": "puppy|"}, {"dog": "puppy|"}),
    ],
)
def test_invalid_options(option: str, value: Any, given: Any) -> None:
    with raises(OptionError, method="pet", option=option, given=given):
        PET(**{option: value})


def test_label_words_of_an_unknown_class() -> None:
    with raises(UnsupportedSite, method="pet", site="head.prompts") as caught:
        attach(tiny(), "pet", label_words={"cow": "calf"})
    assert isinstance(caught.value.__cause__, OptionError)
    assert (caught.value.__cause__.option, caught.value.__cause__.given) == ("label_words", "cow")


def test_models_without_class_prompts_are_unsupported() -> None:
    with raises(UnsupportedSite, method="pet"):
        attach(hosts.get("timm_vit")().tiny()["vit"](), "pet")

"""PPT: the losses without labels image by image, the passes without prompts, and the two parts of a run."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods import bottlenecks, classifiers
from tests.methods.classifiers import InOrder, cosines, labeled_batches
from tests.methods.test_prompt_tuning import class_weights
from tests.raising import raises
from veneer.classification.train.batches import ClassifyingLoss
from veneer.formats import load
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.soft_prompts.ppt import PPT
from veneer.testing.case import perturb
from veneer.training.objective.forward_passes import ForwardPasses


def written_out(first: Tensor, second: Tensor, bare: Tensor, confidence: float) -> Tensor:
    """Matching among the second crops, and the pseudo-class of a confident image; one image at a time."""
    losses = []
    p, q, frozen = (logits.exp() / logits.exp().sum(-1, keepdim=True) for logits in (first, second, bare))
    for i in range(len(p)):
        same = [sum(p[i, c] * other[c] for c in range(p.shape[1])) for other in q]
        loss = -(same[i] / sum(same)).log()
        label = int(frozen[i].argmax())
        if frozen[i, label] >= confidence:
            loss = loss - p[i, label].log()
        losses.append(loss)
    return torch.stack(losses)


def train(tuned: Any) -> Any:
    """Training mode of the adapters alone, as in a run."""
    for _, adapter in tuned.parts.values():
        adapter.train()
    return next(iter(tuned.parameters()))


def crops(images: Tensor, view: int) -> Tensor:
    return images if view == 0 else images.flip(-1) * 0.5


def test_prompts_of_classes() -> None:
    """The loss and its gradient: vectors in the prompts of both crops, constant in the second, and the templates without them."""
    model, images = classifiers.tiny(), classifiers.pictures(count=3)
    bare = model(images).detach()
    confidence = bare.softmax(-1).max(-1).values.median().item()
    tuned = attach(model, "ppt", tokens=4, confidence=confidence)
    perturb(tuned, size=0.3)
    context = train(tuned)
    got = ForwardPasses([tuned]).without_labels(0, lambda view: model(crops(images, view)))
    assert got is not None

    def logits(view: int) -> Tensor:
        return cosines(model, crops(images, view), class_weights(model.clip, context))

    expected = written_out(logits(0), logits(1).detach(), bare, confidence).mean()
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(loss, context)[0] for loss in (got, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[1].abs().max() > 0
    assert not torch.equal(written_out(logits(0), logits(1), bare, 2.0).mean(), expected)


def test_tokens_of_an_image() -> None:
    """The same for prompts beside the patches; the last pass is the model without them."""
    model, images = bottlenecks.tiny(), bottlenecks.random(3, 3, 32, 32)
    bare = copy.deepcopy(model)
    tuned = attach(model, "ppt", tokens=3, confidence=0.0)
    prompt = train(tuned)
    other = attach(same := copy.deepcopy(bare), "prompt_tuning", tokens=3)
    other.load_state_dict(tuned.state_dict())
    tuned.begin_pass(0, 0, 2)
    assert torch.equal(model(images), bare(images))
    got = ForwardPasses([tuned]).without_labels(0, lambda view: model(crops(images, view)))
    assert got is not None
    first, second = same(images), same(crops(images, 1)).detach()
    expected = written_out(first, second, bare(images).detach(), 0.0).mean()
    torch.testing.assert_close(got, expected)
    (theirs,) = torch.autograd.grad(expected, [*other.parameters()])
    torch.testing.assert_close(torch.autograd.grad(got, prompt)[0], theirs)
    assert theirs.abs().max() > 0
    model.eval()
    tuned.begin_pass(0, 0, 2)
    assert torch.equal(model(images), same(images))


def test_the_candidates_of_one_image() -> None:
    """A batch of one image has one candidate; uncertain pseudo-classes are left out."""
    logits = torch.tensor([[0.2, 1.0, -0.5]])
    assert PPT(confidence=1.0).unlabeled_loss([logits] * 3).item() == pytest.approx(0, abs=1e-6)
    pseudo = PPT(confidence=0.5).unlabeled_loss([logits] * 3).item()
    assert pseudo == pytest.approx(-math.log(math.exp(1.0) / sum(map(math.exp, (0.2, 1.0, -0.5)))), abs=1e-6)


def test_a_run_begins_without_labels() -> None:
    """Unlabeled crops in the first half of the steps, then labels with the loss of `prompt_tuning`."""
    model, image, others = classifiers.tiny(), classifiers.pictures(count=4), classifiers.pictures(count=6).flip(0)
    tuned = attach(model, "ppt", tokens=4)
    train(tuned)
    labels, read = torch.tensor([0, 1, 2, 0]), []

    def unlabeled(step: int, rows: list[int], samples: int, view: int) -> Tensor:
        read.append(view)
        return crops(others[rows], view)

    passes = ForwardPasses([tuned])
    loss = ClassifyingLoss(model, labeled_batches(image, labels), InOrder(), 2, passes=passes, unlabeled=unlabeled)
    torch.testing.assert_close(loss(0, [0, 1]), passes.without_labels(0, lambda view: model(crops(others[:2], view)).float()))
    assert sorted(read) == [0, 1]
    tuned.after_step(1, 4)
    assert tuned.unlabeled_passes() == 3
    tuned.after_step(2, 4)
    assert tuned.unlabeled_passes() == 0
    assert tuned.method.schedule_end(4) == 3
    got = loss(2, [0, 1])
    assert len(read) == 2
    other = attach(same := classifiers.tiny(), "coop", tokens=4)
    other.load_state_dict(tuned.state_dict())
    torch.testing.assert_close(got, F.cross_entropy(same(image[:2]).float(), labels[:2]))


def test_passes_of_other_methods_have_the_prompts() -> None:
    """After the pre-training, a third pass is that of another method, such as a pattern of `pet`."""
    model, image = classifiers.tiny(), classifiers.pictures()
    bare = model(image)
    tuned = attach(model, "ppt", tokens=4)
    perturb(tuned, size=0.3)
    train(tuned)
    tuned.begin_pass(0, 0, 2)
    torch.testing.assert_close(model(image), bare)
    tuned.after_step(2, 4)
    tuned.begin_pass(0, 3, 2)
    assert not torch.allclose(model(image), bare)


def test_the_file_and_a_resumed_run(tmp_path: Any) -> None:
    model, image = classifiers.tiny(), classifiers.pictures()
    tuned = attach(model, "ppt", tokens=4)
    tuned.after_step(3, 4)
    (part,) = (adapter for _, adapter in tuned.parts.values())
    assert part.training_buffers == ("pretrains",)
    assert not part.pretrains
    assert [*tuned.state_dict()] == ["head.prompts:context"]
    load(other := classifiers.tiny(), tuned.save(tmp_path / "x"))
    torch.testing.assert_close(other(image), model(image))


def test_count() -> None:
    """10,240 on CLIP ViT-B/16 with 20 vectors, those of `prompt_tuning`."""
    assert attach(classifiers.large("ViT-B-16"), "ppt").report().trainable == 10_240


@pytest.mark.parametrize(
    ("option", "given"), [("pretraining_share", 0.0), ("pretraining_share", 1.0), ("confidence", -0.1), ("tokens", 0)]
)
def test_invalid_options(option: str, given: Any) -> None:
    with raises(OptionError, method="ppt", option=option, given=given):
        PPT(**{option: given})

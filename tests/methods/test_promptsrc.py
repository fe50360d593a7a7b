"""PromptSRC against both towers written out block by block, and its loss and average against their formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.methods.classifiers import large, pictures, tiny, token
from tests.methods.deep_prompts import KEYS, cosine_logits, image_features, text_features
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.class_prompts._templates import TEMPLATES
from veneer.methods.prompt.class_prompts.promptsrc import PromptSRC
from veneer.testing.case import perturb
from veneer.training.objective.consistency import symmetric_kl
from veneer.training.objective.forward_passes import ForwardPasses

FROZEN = ("a bad photo of a {}.", "my {}")
WEIGHTS = {"text_weight": 25.0, "image_weight": 10.0, "logit_weight": 2.0}


def features(model: Any, image: Tensor, adapter: Any) -> tuple[Tensor, Tensor]:
    """Image and text features with prompts."""
    prompts = [adapter.context, *adapter.deep]
    return image_features(model.clip, image, list(adapter.images)), text_features(model.clip, prompts, ())


@pytest.mark.parametrize("key", list(KEYS))
def test_equation_and_gradients(key: str) -> None:
    model, image = tiny(key), pictures(KEYS[key])
    tuned = attach(model, "promptsrc", depth=2, image_tokens=3)
    perturb(tuned)
    adapter = tuned.parts["head.prompts"][1]
    assert (adapter.context.shape, adapter.deep.shape) == ((4, 20), (1, 4, 20))
    bare = tiny(key)
    got, wanted = model(image), cosine_logits(bare.clip, *features(bare, image, adapter))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    parameters, weight = list(tuned.parameters()), torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    pairs = [torch.autograd.grad((logits * weight).sum(), parameters) for logits in (got, wanted)]
    for left, right in zip(*pairs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


def test_loss_and_gradients() -> None:
    """Two passes through the trainer's own code, as `veneer transfer` runs them."""
    model, image, bare = tiny(), pictures(), tiny()
    tuned = attach(model, "promptsrc", depth=2, templates=FROZEN, **WEIGHTS)
    perturb(tuned)
    model.train()
    adapter, parameters = tuned.parts["head.prompts"][1], list(tuned.parameters())
    logits, extra = ForwardPasses([tuned])(0, lambda: model(image), symmetric_kl)
    got = extra.mean() + tuned.penalty()
    gradients = torch.autograd.grad(got, parameters)
    assert tuned.penalty() is None, "the features of a batch are used once"
    f, g = features(bare, image, adapter)
    with torch.no_grad():
        f0 = normalize(bare.clip.encode_image(image), dim=-1)
        texts = [[t.replace("{}", name) for t in FROZEN] for name in ("toy cat", "dog", "red car")]
        tokenizer = bare.head.texts.tokenizer.tokenizer
        g0 = normalize(torch.stack([bare.clip.encode_text(tokenizer(t)).mean(0) for t in texts]), dim=-1)
    scale = bare.clip.logit_scale.exp()
    q0, q = (scale * f0 @ g0.T).softmax(-1), (scale * normalize(f, dim=-1) @ normalize(g, dim=-1).T).softmax(-1)
    divergence = (q0 * (q0.log() - q.log())).sum() / q.numel()
    expected = 2.0 * divergence + 25 * (normalize(g, dim=-1) - g0).abs().mean() + 10 * (normalize(f, dim=-1) - f0).abs().mean()
    torch.testing.assert_close(logits.softmax(-1), q)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for left, right in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def test_the_pass_of_the_frozen_model_ends_with_training() -> None:
    model, image = tiny(), pictures()
    tuned = attach(model, "promptsrc", depth=2, templates=FROZEN)
    expected = model(image)
    model.train()
    tuned.begin_pass(0, 0, number=1)
    frozen = model(image)
    assert (frozen - expected).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(image), expected)
    assert tuned.method.passes == 2
    assert PromptSRC(text_weight=0, image_weight=0, logit_weight=0).passes == 1


def test_average() -> None:
    """Weights of a normal density at 1 … E, whose sum is 1; steps of a run are divided into E parts."""
    model = tiny()
    options = {"average_parts": 4, "average_mean": 3.0, "average_std": 0.8}
    tuned = attach(model, "promptsrc", depth=2, **options)
    adapter = tuned.parts["head.prompts"][1]
    before, points = adapter.images.detach().clone(), []
    tuned.finalize()
    assert torch.equal(adapter.images, before), "without steps there is no average"
    for step in range(1, 11):
        with torch.no_grad():
            for p in tuned.parameters():
                p.add_(step)
        tuned.after_step(step, 10)
        if step in (3, 5, 8, 10):  # the first steps at which 4·step // 10 is 1, 2, 3 and 4
            points.append(adapter.images.detach().clone())
    weights = [math.exp(-((e - 3) ** 2) / (2 * 0.8**2)) for e in (1, 2, 3, 4)]
    expected = sum(w / sum(weights) * point for w, point in zip(weights, points, strict=True))
    tuned.finalize()
    torch.testing.assert_close(adapter.images.detach(), expected)
    tuned.finalize()
    torch.testing.assert_close(adapter.images.detach(), expected)
    assert tuned.method.schedule_end(10) == 10


def test_more_parts_than_steps() -> None:
    """Parts without a step of their own count with the parameters of the step in which they end."""
    method = PromptSRC(average_parts=5, average_mean=2.0)
    kept = 1.0
    for share in (*method.shares(1, 2), *method.shares(2, 2)):
        kept *= 1 - share
    weights = [math.exp(-((e - 2) ** 2) / 2) for e in range(1, 6)]
    after_first = sum(weights[:2]) / sum(weights)
    left = 1.0
    for share in method.shares(2, 2):
        left *= 1 - share
    assert len(method.shares(1, 2)) == 2
    assert left == pytest.approx(after_first)
    assert kept == 0


def test_initial_values_and_counts_of_the_paper() -> None:
    model = tiny()
    adapter = attach(model, "promptsrc", depth=2, image_tokens=12).parts["head.prompts"][1]
    words = [token(w) for w in ("a", "photo", "of", "a")]
    assert torch.equal(adapter.context, model.clip.token_embedding.weight[words])
    assert 0.017 < adapter.images.std() < 0.023
    assert adapter.template_ids.shape[:2] == (3, len(TEMPLATES)) == (3, 60)
    assert attach(large("ViT-B-16"), "promptsrc").report().trainable == 9 * 4 * (512 + 768) == 46_080


def test_incompatible_arguments_are_named() -> None:
    wrong = {"depth": 0, "image_tokens": 0, "average_parts": 0, "text_weight": -1, "average_std": 0}
    for option, given in wrong.items():
        with raises(OptionError, method="promptsrc", option=option, given=given):
            PromptSRC(**{option: given})
    with raises(OptionError, method="promptsrc", option="templates", given="a photo"):
        PromptSRC(templates=("a photo",))
    with raises(UnsupportedSite, method="promptsrc", option="words", given=4, expected=5):
        attach(tiny(), "promptsrc", tokens=5)

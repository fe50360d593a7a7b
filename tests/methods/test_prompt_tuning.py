"""Prompt tuning: a ViT and the prompts of classes with the vectors written into them, and every initialization."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods import bottlenecks, classifiers
from tests.methods.classifiers import cosines, encode, large, row, token
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.soft_prompts.prompt_tuning import PromptTuning

START, END = 62, 63
NAMES = (("toy", "cat"), ("dog",), ("red", "car"))


def class_weights(clip: Any, vectors: Tensor) -> list[Tensor]:
    """[start] v … name . [end], encoded one by one."""
    prompts = [[START, *vectors, *map(token, name), token("."), END] for name in NAMES]
    return [encode(clip, row(clip, prompt), len(prompt) - 1) for prompt in prompts]


@pytest.mark.parametrize("key", ["vit", "vit_registers"])
def test_tokens_of_an_image(key: str) -> None:
    """The equation, its gradient, and that of shallow `vpt` with the same prompts."""
    bare, model, other, x = bottlenecks.tiny(key), bottlenecks.tiny(key), bottlenecks.tiny(key), bottlenecks.picture()
    tuned = attach(model, "prompt_tuning", tokens=3)
    assert list(tuned.parts) == ["tokens"]
    prompt = next(iter(tuned.parameters()))
    first = bare.num_prefix_tokens

    def block(depth: int, module: Any, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :first], prompt.expand(2, -1, -1), x[:, first:]], 1) if depth == 0 else x
        x = module(x)
        return torch.cat([x[:, :first], x[:, first + 3 :]], 1) if depth == 1 else x

    got, expected = model(x), bottlenecks.blocks_written_out(bare, block, x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), prompt)[0] for y in (got, expected)))
    vpt = attach(other, "vpt", tokens=3, where="tokens.tower")
    vpt.load_state_dict(tuned.state_dict())
    assert torch.equal(other(x), got)
    features = model.forward_features(x)  # without the prompts
    assert features.shape == bare.forward_features(x).shape
    assert torch.equal(features, other.forward_features(x))


def test_prompts_of_classes() -> None:
    """The default at a CLIP, its gradient, and that of `coop` with the same vectors."""
    model, image = classifiers.tiny(), classifiers.pictures()
    tuned = attach(model, "prompt_tuning", tokens=4)
    assert list(tuned.parts) == ["head.prompts"]
    context = next(iter(tuned.parameters()))
    with torch.no_grad():
        context.add_(torch.randn_like(context))
    got, expected = model(image), cosines(model, image, class_weights(model.clip, context))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), context)[0] for y in (got, expected)))
    coop = attach(other := classifiers.tiny(), "coop", tokens=4)
    coop.load_state_dict(tuned.state_dict())
    assert torch.equal(other(image), got)


def test_initial_vectors() -> None:
    """Rows of the table without repetition, means of the tokens of class names and words, U(−limit, limit)."""
    model = classifiers.tiny()
    table = model.clip.token_embedding.weight

    def initial(**options: Any) -> Tensor:
        torch.manual_seed(0)
        tuned = attach(model, "prompt_tuning", **options)
        (vectors,) = tuned.state_dict().values()
        tuned.detach()
        return vectors

    def ids(vectors: Tensor) -> list[int]:
        matches = (vectors[:, None] == table).all(-1)
        assert (matches.sum(1) == 1).all()
        return matches.int().argmax(1).tolist()

    assert len(set(ids(initial(tokens=10)))) == 10
    classes = initial(tokens=5, initialize="classes")
    for vector, name in zip(classes, NAMES, strict=False):
        torch.testing.assert_close(vector, table[[token(word) for word in name]].mean(0))
    assert len(set(ids(classes[3:]))) == 2
    words = initial(tokens=3, words="a photo", initialize="uniform", limit=0.25)
    assert ids(words[:2]) == [token("a"), token("photo")]
    uniform = initial(tokens=10, initialize="uniform", limit=0.25)
    assert 0.24 < uniform.abs().max() <= 0.25
    assert uniform.std().item() == pytest.approx(0.5 / 12**0.5, rel=0.1)
    assert torch.equal(initial(tokens=2, initialize="classes"), classes[:2])


def test_counts_and_the_uniform_range_of_images() -> None:
    """ViT-B/16 15,360 and CLIP ViT-B/16 10,240 with p = 20."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    tuned = attach(vit, "prompt_tuning")
    assert tuned.report().trainable == 15_360
    assert attach(large("ViT-B-16"), "prompt_tuning").report().trainable == 10_240
    prompt: Any = PromptTuning().build(tuned.parts["tokens"][0])
    assert 0.499 < prompt.vectors().abs().max() <= 0.5


def test_bad_input() -> None:
    for option, given in {"tokens": 0, "initialize": "zero", "limit": 0.0}.items():
        options: dict[str, Any] = {option: given}
        with raises(OptionError, method="prompt_tuning", option=option, given=given):
            PromptTuning(**options)
    with raises(UnsupportedSite, method="prompt_tuning", site="head.prompts", expected=20):
        attach(classifiers.tiny(), "prompt_tuning")
    for option, given in {"initialize": "vocabulary", "words": "a photo"}.items():
        with raises(UnsupportedSite, method="prompt_tuning", site="tokens", option=option, given=given):
            attach(bottlenecks.tiny(), "prompt_tuning", **{option: given})

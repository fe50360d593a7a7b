"""DART: the prompts of classes with trained template and label words, written out one by one, and the fluency term."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from tests.methods.bottlenecks import stirred
from tests.methods.classifiers import cosines, encode, large, pictures, row, tiny, token
from tests.raising import raises
from veneer.injection import LoadError, attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.soft_prompts.dart import DART
from veneer.models.clip_classifier import CLIPClassifier

START, END = 62, 63
NAMES = (("toy", "cat"), ("dog",), ("red", "car"))


def class_weights(clip: Any, words: Any, labels: Any) -> list[Tensor]:
    """[start] v … l … . [end] with l of the class, from all labels one after the other."""
    first, weights = 0, []
    for name in NAMES:
        prompt = [START, *words, *labels[first : first + len(name)], token("."), END]
        weights.append(encode(clip, row(clip, prompt), len(prompt) - 1))
        first += len(name)
    return weights


def test_values_gradients_and_the_fluency_term() -> None:
    model, image = tiny(), pictures()
    own = model.head.texts(image)
    tuned = attach(model, "dart", words="my photo of", fluency=0.5)
    (adapter,) = (a for _, a in tuned.parts.values())
    ids = [token(w) for w in ("my", "photo", "of")], [token(w) for name in NAMES for w in name]
    torch.testing.assert_close(model(image), cosines(model, image, class_weights(model.clip, *ids)))
    stirred(tuned)
    parameters = [adapter.context, adapter.labels]
    assert [tuple(p.shape) for p in parameters] == [(3, 20), (5, 20)]
    weights = class_weights(model.clip, *parameters)
    penalty = 0.5 * sum(1 - w @ o / (w.norm() * o.norm()) for w, o in zip(weights, own, strict=True)) / 3
    pairs = [(model(image), cosines(model, image, weights)), (tuned.penalty(), penalty)]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            *(torch.autograd.grad(y.square().sum(), parameters, retain_graph=True) for y in (got, expected)), strict=True
        ):
            torch.testing.assert_close(a, b)
            assert b.abs().max() > 0


def test_words_beside_another_attachment_and_files_of_other_classes() -> None:
    """The copies are rows of the base table. A state of other classes does not fit, and no fluency needs no second pass."""
    model = tiny()
    for p in attach(model, "lora", where="embed.token").parameters():
        torch.nn.init.normal_(p)
    tuned = attach(model, "dart", words="", tokens=2, fluency=0.0)
    (adapter,) = (a for _, a in tuned.parts.values())
    assert torch.equal(adapter.labels, tiny().clip.token_embedding.weight[[token(w) for name in NAMES for w in name]])
    assert 0.01 < adapter.context.std() < 0.03
    assert tuned.penalty() is None
    state = {name: t[:-1] if name.endswith("labels") else t for name, t in tuned.state_dict().items()}
    with raises(LoadError, missing=()) as caught:
        tuned.load_state_dict(state)
    assert [name.rpartition(":")[2] for name in caught.value.misshapen] == ["labels"]


def test_a_new_adapter_is_the_classifier_of_its_template() -> None:
    """Also for names that end in punctuation, which the tokenizer joins with the full stop."""
    tokenizer, names = open_clip.tokenizer.SimpleTokenizer(), ["kite (bird of prey)", "C++", "St.", "dog"]
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8}
    clip = open_clip.model.CLIP(embed_dim=4, vision_cfg=vision, text_cfg=text).eval()
    model, image = CLIPClassifier(clip, tokenizer, names, ("a photo of a {}.",)).eval(), pictures().float()
    expected = model(image)
    tuned = attach(model, "dart")
    torch.testing.assert_close(model(image), expected)
    assert tuned.report().trainable == (4 + 6 + 2 + 2 + 1) * 4


def test_count() -> None:
    """(4 + 10·2)·512: ten names of two tokens in CLIP ViT-B/16."""
    model = large(
        "ViT-B-16", [f"{color} {thing}" for color in ("red", "blue") for thing in ("cat", "dog", "car", "tree", "house")]
    )
    assert attach(model, "dart").report().trainable == 24 * 512 == 12_288


@pytest.mark.parametrize(("option", "given"), [("tokens", 0), ("fluency", -1.0)])
def test_options_out_of_range(option: str, given: Any) -> None:
    options: dict[str, Any] = {option: given}
    with raises(OptionError, method="dart", option=option, given=given):
        DART(**options)

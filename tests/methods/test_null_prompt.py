"""Null prompts against a CLIP with changed biases and prompts written out token by token."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.classifiers import cosines, encode, large, pictures, row, tiny, token
from tests.methods.test_coop import END, NAMES, SIDES, START
from tests.raising import raises
from veneer.formats import load
from veneer.hosts.clip_classifier import small_tokenizer
from veneer.injection import UnsupportedSite, attach
from veneer.injection.registry import hosts
from veneer.injection.sites import ParamSite
from veneer.injection.towers import sites
from veneer.models.clip_classifier import CLIPClassifier
from veneer.models.tokenizer import TextError
from veneer.testing.case import perturb


def expected(model: Any, image: Tensor) -> Tensor:
    """Logits of prompts [start] name [end]."""
    weights = []
    for words in NAMES.values():
        prompt = [START, *map(token, words), END]
        weights.append(encode(model.clip, row(model.clip, prompt), len(prompt) - 1))
    return cosines(model, image, weights)


def biases(model: Any, names: set[str]) -> dict[str, Tensor]:
    """Biases of both towers by name, those of packed attention included, without the logit bias."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in names and "logit" not in name}


@pytest.mark.parametrize("key", list(SIDES))
def test_equation_and_gradient(key: str) -> None:
    model, image = tiny(key), pictures(SIDES[key])
    explicit = copy.deepcopy(model)
    tuned = attach(model, "null_prompt")
    perturb(tuned, size=0.3)
    parts = {site: adapter for site, adapter in tuned.parts.values() if isinstance(site, ParamSite)}
    with torch.no_grad():
        for site, adapter in parts.items():
            explicit.get_submodule(site.path).get_parameter(site.param)[slice(*site.rows) if site.rows else ...] += adapter.delta
    got, wanted = model(image), expected(explicit, image)
    torch.testing.assert_close(got, wanted)
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    (got * weight).sum().backward()
    (wanted * weight).sum().backward()
    for site, adapter in parts.items():
        grad = explicit.get_submodule(site.path).get_parameter(site.param).grad
        gradient = torch.zeros_like(adapter.delta) if grad is None else grad[slice(*site.rows) if site.rows else ...]
        torch.testing.assert_close(adapter.delta.grad, gradient, msg=site.name)
    assert {site.tower for site in parts} == {"vision", "text"}
    total = sum(p.numel() for p in biases(explicit, {"bias", "in_proj_bias"}).values())
    assert tuned.report().trainable == total


def test_a_new_adapter_is_the_classifier_with_bare_names() -> None:
    model, image = tiny(), pictures()
    bare = CLIPClassifier(model.clip, small_tokenizer, list(NAMES), ("{}",)).eval()
    with_template, wanted = model(image), bare(image)
    tuned = attach(model, "null_prompt")
    torch.testing.assert_close(model(image), wanted)
    assert not torch.allclose(with_template, wanted)
    tuned.detach()
    assert torch.equal(model(image), with_template)


def test_towers_can_be_selected() -> None:
    text = attach(tiny(), "null_prompt", where="prompts text/bias")
    towers = {site.tower for site, _ in text.parts.values()}
    assert towers == {"text"}
    assert "head.prompts" in text.parts


def test_a_file_has_the_deltas_alone_and_fits_other_classes(tmp_path: Any) -> None:
    model, image = tiny(), pictures()
    tuned = attach(model, "null_prompt")
    perturb(tuned, size=0.3)
    assert not [name for name in tuned.state_dict() if name.startswith("head.prompts")]
    file = tuned.save(tmp_path / "names")
    other = CLIPClassifier(copy.deepcopy(tiny().clip), small_tokenizer, ["dog", "toy cat"]).eval()
    load(other, file)
    torch.testing.assert_close(other(image), model(image)[:, [1, 0]])


def test_count() -> None:
    """BitFit on both towers of ViT-B/16; the prompts have none."""
    tuned = attach(large("ViT-B-16"), "null_prompt")
    assert tuned.report().trainable == attach(large("ViT-B-16"), "bitfit").report().trainable == 171_008


def test_models_without_class_prompts_are_unsupported() -> None:
    for host, key in (("timm_vit", "vit"), ("open_clip", "vit"), ("clip_classifier", "linear")):
        model = hosts.get(host)().tiny()[key]()
        assert [site for site in sites(model) if site.role.startswith("bias")]
        with raises(UnsupportedSite, method="null_prompt"):
            attach(model, "null_prompt")


def test_a_name_that_is_too_long() -> None:
    model = CLIPClassifier(tiny().clip, small_tokenizer, ["dog", "cat"], ("{}",))
    model.head.texts.names = ("dog", " ".join(["dog"] * 19))
    with raises(UnsupportedSite, method="null_prompt", site="head.prompts") as caught:
        attach(model, "null_prompt")
    assert isinstance(caught.value.__cause__, TextError)

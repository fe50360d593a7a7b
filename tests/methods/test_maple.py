"""MaPLe against both towers written out block by block."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.classifiers import large, pictures, prompt_site, tiny, token
from tests.methods.deep_prompts import KEYS, cosine_logits, image_features, text_features
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.attachment.plan import supports
from veneer.injection.errors import OptionError, StateError
from veneer.injection.towers import sites
from veneer.methods.prompt.class_prompts.maple import MaPLe
from veneer.testing.case import perturb

WORDS = ("a", "photo", "of", "a")


def clip_site(layers: int = 2, images: int = 2) -> Any:
    """The prompts of a CLIP with other numbers of blocks."""
    site: Any = prompt_site(tiny())
    return dataclasses.replace(site, layers=layers, images=(site.images * images)[:images])


def expected(model: Any, image: Tensor, adapter: Any, words: tuple[str, ...]) -> Tensor:
    prompts = [adapter.context, *(adapter.deep if adapter.deep is not None else ())]
    images = [p @ f.weight.T + f.bias for p, f in zip(prompts, adapter.project, strict=True)]
    return cosine_logits(model.clip, image_features(model.clip, image, images), text_features(model.clip, prompts, words))


@pytest.mark.parametrize(("key", "depth"), [("vit", 1), ("vit", 2), ("timm", 2)])
def test_equation_and_gradients(key: str, depth: int) -> None:
    model, image = tiny(key), pictures(KEYS[key])
    tuned = attach(model, "maple", depth=depth)
    perturb(tuned)
    adapter = tuned.parts["head.prompts"][1]
    got, wanted = model(image), expected(tiny(key), image, adapter, WORDS[2:])
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = list(tuned.parameters())
    pairs = [torch.autograd.grad((logits * weight).sum(), parameters) for logits in (got, wanted)]
    for left, right in zip(*pairs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)
    assert all(gradient.abs().max() > 0 for gradient in pairs[0])


def test_a_depth_below_that_of_the_towers_lets_the_outputs_of_the_prompts_pass_on() -> None:
    """With removed prompts in the second block the features would be others."""
    model, image = tiny(), pictures()
    adapter = attach(model, "maple", depth=1).parts["head.prompts"][1]
    first, length = adapter.project[0](adapter.context), []
    model.clip.visual.transformer.resblocks[1].register_forward_pre_hook(lambda module, args: length.append(args[0].shape[1]))
    got = model.encode_image(image)
    torch.testing.assert_close(got, image_features(tiny().clip, image, [first]))
    assert length == [5 + 2]


def test_initial_values() -> None:
    model = tiny()
    adapter = attach(model, "maple", tokens=3, depth=2).parts["head.prompts"][1]
    assert torch.equal(adapter.context, model.clip.token_embedding.weight[[token(w) for w in WORDS[:3]]])
    torch.manual_seed(0)
    spread = MaPLe(words="", tokens=14, depth=2).build(clip_site()).deep.std()
    assert 0.016 < spread < 0.024
    wide = MaPLe(depth=3).build(clip_site(layers=3, images=3))
    assert torch.equal(wide.project[1].weight, wide.project[2].weight)
    assert not torch.equal(wide.project[0].weight, wide.project[1].weight)


def test_a_depth_above_that_of_the_towers_is_reduced() -> None:
    assert len(attach(tiny(), "maple").parts["head.prompts"][1].project) == 2
    assert len(MaPLe().build(clip_site(layers=1)).project) == 1


def test_two_act_together_and_each_is_alone_when_the_other_is_off() -> None:
    model, image = tiny(), pictures()
    pair = [attach(model, "maple", tokens=n, depth=d) for n, d in ((2, 1), (3, 2))]
    for seed, tuned in enumerate(pair):
        perturb(tuned, seed)
    adapters = [tuned.parts["head.prompts"][1] for tuned in pair]
    first = [a.image_prompt(0) for a in adapters]
    visual = tiny().clip.visual
    x = visual._embeds(image)
    x = visual.transformer.resblocks[0](torch.cat([x, *(visual.ln_pre(p).expand(2, -1, -1) for p in first)], 1))
    x = visual.transformer.resblocks[1](torch.cat([x[:, : 5 + 2], adapters[1].image_prompt(1).expand(2, -1, -1)], 1))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), visual.ln_post(x[:, 0]) @ visual.proj)
        with pair[0].enabled(False):
            torch.testing.assert_close(model(image), expected(tiny(), image, adapters[1], WORDS[3:]))


def test_counts_of_the_paper() -> None:
    count = 9 * 2 * 512 + 9 * (512 * 768 + 768)
    assert attach(large("ViT-B-16"), "maple").report().trainable == count == 3_555_072


def test_incompatible_arguments_are_named() -> None:
    for option, given in (("depth", 0), ("tokens", 0)):
        with raises(OptionError, method="maple", option=option, given=given):
            MaPLe(**{option: given})
    with raises(UnsupportedSite, method="maple", option="words", given=2, expected=3):
        attach(tiny(), "maple", tokens=3, words="a photo")
    for key in ("resnet", "linear"):  # no vision transformer, no text head
        assert not any(supports(MaPLe, site) for site in sites(tiny(key)))
    model = tiny()
    tuned = attach(model, "maple", depth=2)
    with raises(StateError, given=0.5, expected=(0, 1)):
        tuned.scale = 0.5
    with raises(UnsupportedSite, site="head.prompts", given=1, expected=2):
        attach(model, "maple", depth=1)

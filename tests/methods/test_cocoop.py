"""CoCoOp against one prompt for each pair of image and class, written out."""

import pytest
import torch

from tests.methods.classifiers import encode, large, pictures, row, tiny, token
from tests.methods.test_coop import END, NAMES, SIDES, START
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.methods.prompt.class_prompts.cocoop import CoCoOp


@pytest.mark.parametrize("key", list(SIDES))
def test_equation(key: str) -> None:
    model, image = tiny(key), pictures(SIDES[key])
    tuned = attach(model, "cocoop", reduction=4)
    adapter = tuned.parts["head.prompts"][1]
    first, _, second = adapter.net
    assert adapter.context.shape == (4, 20)
    assert first.weight.shape == (4, 16)
    assert second.weight.shape == (20, 4)
    features, scale = model.clip.encode_image(image), model.clip.logit_scale.exp()
    logits = []
    for f in features:
        f = f / f.norm()
        moved = second.weight @ torch.relu(first.weight @ f + first.bias) + second.bias
        for words in NAMES.values():
            prompt = [START, *(v + moved for v in adapter.context), *map(token, words), token("."), END]
            logits.append(scale * f @ encode(model.clip, row(model.clip, prompt), len(prompt) - 1))
    torch.testing.assert_close(model(image), torch.stack(logits).view(2, 3))


def test_it_starts_at_the_embeddings_of_words() -> None:
    model = tiny()
    adapter = attach(model, "cocoop", reduction=4).parts["head.prompts"][1]
    words = [token(w) for w in ("a", "photo", "of", "a")]
    assert torch.equal(adapter.context, model.clip.token_embedding.weight[words])
    spread = attach(tiny(), CoCoOp(words="", tokens=12, reduction=1)).parts["head.prompts"][1].context.std()
    assert 0.016 < spread < 0.024


def test_it_reads_features_that_others_have_changed() -> None:
    """In any order of attaching, h reads the input of the head."""
    model, image = tiny(), pictures()
    tuned = attach(model, "cocoop", reduction=4)
    attach(model, "clip_adapter", ratio=0.5)
    seen = {}
    model.head.texts.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model.head.register_forward_pre_hook(lambda module, args: seen.update(f=args[0]))
    model(image)
    assert torch.equal(seen["x"], seen["f"])
    assert not torch.equal(seen["f"], model.clip.encode_image(image))
    tuned.detach()


def test_counts_of_the_paper() -> None:
    for name, width in {"ViT-B-16": 512, "RN50": 1024}.items():
        hidden = width // 16
        count = 4 * 512 + (width * hidden + hidden) + (hidden * 512 + 512)
        assert attach(large(name), "cocoop").report().trainable == count
    assert attach(large("ViT-B-16"), "cocoop").report().trainable == 35_360


def test_a_reduction_to_zero_width_is_rejected() -> None:
    with raises(UnsupportedSite, method="cocoop", option="reduction", given=17):
        attach(tiny(), "cocoop", reduction=17)

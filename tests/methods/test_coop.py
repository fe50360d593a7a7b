"""CoOp against prompts that are written out vector by vector."""

import pytest
import torch
from torch import Tensor

from tests.methods.classifiers import cosines, encode, large, pictures, prompt_site, row, tiny, token
from tests.raising import raises
from veneer.injection import LoadError, UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.class_prompts.coop import CoOp
from veneer.models.tokenizer import TextError

START, END = 62, 63
NAMES = {"toy cat": ("toy", "cat"), "dog": ("dog",), "red car": ("red", "car")}
SIDES = {"vit": 16, "resnet": 64, "timm": 160}


def expected(model, image: Tensor, contexts: dict[str, Tensor], split: int | None) -> Tensor:
    """Logits with [start] v … name . [end], or with the name behind `split` of the vectors."""
    weights = []
    for name, words in NAMES.items():
        context, named = list(contexts[name]), [token(w) for w in words]
        at = len(context) if split is None else split
        prompt = [START, *context[:at], *named, *context[at:], token("."), END]
        weights.append(encode(model.clip, row(model.clip, prompt), len(prompt) - 1))
    return cosines(model, image, weights)


@pytest.mark.parametrize("key", list(SIDES))
def test_common_context_in_front_of_the_name(key: str) -> None:
    model, image = tiny(key), pictures(SIDES[key])
    tuned = attach(model, "coop", tokens=5)
    context = tuned.parts["head.prompts"][1].context
    assert context.shape == (5, 20)
    torch.testing.assert_close(model(image), expected(model, image, dict.fromkeys(NAMES, context), None))


@pytest.mark.parametrize(("position", "split"), [("middle", 2), ("front", 0)])
def test_places_of_the_name(position: str, split: int) -> None:
    model, image = tiny(), pictures()
    context = attach(model, "coop", tokens=5, position=position).parts["head.prompts"][1].context
    got = model(image)
    torch.testing.assert_close(got, expected(model, image, dict.fromkeys(NAMES, context), split))
    assert (got - expected(model, image, dict.fromkeys(NAMES, context), None)).abs().max() > 1e-3


def test_a_context_for_each_class() -> None:
    model, image = tiny(), pictures()
    context = attach(model, "coop", tokens=3, by_class=True).parts["head.prompts"][1].context
    assert context.shape == (3, 3, 20)
    torch.testing.assert_close(model(image), expected(model, image, dict(zip(NAMES, context, strict=True)), None))


def test_a_context_initialized_with_words_equals_the_template() -> None:
    model, image = tiny(), pictures()
    tuned = attach(model, "coop", words="a photo of a")
    context = tuned.parts["head.prompts"][1].context
    table = model.clip.token_embedding.weight
    assert torch.equal(context, table[[token(w) for w in ("a", "photo", "of", "a")]])
    got = model(image)
    tuned.detach()
    texts = [[START, *(token(w) for w in ("a", "photo", "of", "a", *words, ".")), END] for words in NAMES.values()]
    weights = [encode(model.clip, row(model.clip, ids), len(ids) - 1) for ids in texts]
    torch.testing.assert_close(got, cosines(model, image, weights))


def test_words_are_initialized_with_the_rows_of_the_host_beside_other_attachments() -> None:
    model = tiny()
    for p in attach(model, "lora", where="embed.token").parameters():
        torch.nn.init.normal_(p)
    context = attach(model, "coop", words="a photo").parts["head.prompts"][1].context
    assert torch.equal(context, tiny().clip.token_embedding.weight[[token("a"), token("photo")]])


def test_gradients_pass_through_the_frozen_text_tower() -> None:
    model, image = tiny(), pictures()
    tuned = attach(model, "coop", tokens=4)
    (context,) = tuned.parameters()
    weight = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((model(image) * weight).sum(), context)
    (wanted,) = torch.autograd.grad((expected(model, image, dict.fromkeys(NAMES, context), None) * weight).sum(), context)
    torch.testing.assert_close(got, wanted)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "veneer" not in n)


def test_strength_is_between_the_templates_and_the_learned_prompts() -> None:
    model, image = tiny(), pictures()
    own = model.head.texts(image)
    tuned = attach(model, "coop", tokens=4)
    learned = tuned.parts["head.prompts"][1].weights(image)
    tuned.scale = 0.25
    torch.testing.assert_close(model(image), cosines(model, image, own + 0.25 * (learned - own)))


def test_two_at_half_strength_are_the_mean_of_both() -> None:
    model, image = tiny(), pictures()
    pair = [attach(model, "coop", tokens=n) for n in (2, 4)]
    each = [a.parts["head.prompts"][1].weights(image) for a in pair]
    for attachment in pair:
        attachment.scale = 0.5
    torch.testing.assert_close(model(image), cosines(model, image, (each[0] + each[1]) / 2))


def test_a_common_context_is_loaded_onto_other_classes(tmp_path) -> None:
    from veneer.formats import load
    from veneer.hosts.clip_classifier import small_tokenizer
    from veneer.models.clip_classifier import CLIPClassifier

    model, image = tiny(), pictures()
    tuned, by_class = attach(model, "coop", tokens=4), attach(model, "coop", tokens=4, by_class=True)
    files = tuned.save(tmp_path / "common"), by_class.save(tmp_path / "by_class")
    by_class.detach()
    more = [*NAMES, "tall tree"]
    other = CLIPClassifier(tiny().clip, small_tokenizer, more).double().eval()
    load(other, files[0])
    torch.testing.assert_close(other(image)[:, :3], model(image))
    with pytest.raises(LoadError) as caught:
        load(CLIPClassifier(tiny().clip, small_tokenizer, more).double().eval(), files[1])
    assert [key.rpartition(":")[2] for key in caught.value.misshapen] == ["context"]


def test_prompts_have_the_ids_that_the_tokenizer_gives_them() -> None:
    names = ("St. Bernard", "ice-cream", "Boeing 737 airliner", "it's")
    model = large("ViT-B-32", names)
    for tokens in (4, 16):
        adapter = CoOp(tokens=tokens).build(prompt_site(model))
        texts = [" ".join(["X"] * tokens) + f" {name}." for name in names]
        assert torch.equal(adapter.ids, model.head.texts.tokenizer.tokenizer(texts))


def test_counts_of_the_paper() -> None:
    for name in ("RN50", "ViT-B-16"):
        model = large(name, [f"class {i}" for i in range(10)])
        assert attach(model, "coop").report().trainable == 16 * 512 == 8192
        assert attach(model, "coop", by_class=True).report().trainable == 10 * 8192
        assert attach(model, "coop", words="a photo of a").report().trainable == 4 * 512


def test_incompatible_arguments_are_named() -> None:
    with raises(UnsupportedSite, method="coop", site="head.prompts") as caught:
        attach(tiny(), "coop", tokens=16)
    assert isinstance(caught.value.__cause__, TextError)
    with raises(OptionError, method="coop", option="position", given="behind"):
        CoOp(position="behind")  # type: ignore[arg-type]
    with raises(UnsupportedSite, method="coop", host="clip_classifier"):
        attach(tiny("linear"), "coop")

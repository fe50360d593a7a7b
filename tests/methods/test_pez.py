"""PEZ against the nearest rows of the table, found row by row, and the gradient at them."""

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from tests.methods.classifiers import cosines, encode, pictures, row, tiny, token
from tests.methods.test_coop import END, NAMES, SIDES, START
from tests.raising import raises
from veneer.formats import load
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.class_prompts.pez import PEZ
from veneer.models.clip_classifier import CLIPClassifier
from veneer.models.tokenizer import TextError
from veneer.testing.case import perturb


def table_of(model: Any) -> Tensor:
    return getattr(model.clip, "text", model.clip).token_embedding.weight


def nearest(model: Any, context: Tensor) -> list[int]:
    """For each vector the id with the largest cosine similarity, one pair after the other."""
    best = []
    for vector in context:
        similar = [float(vector @ e / (vector.norm() * e.norm())) for e in table_of(model)]
        best.append(max((i for i in range(len(similar)) if i not in (START, END)), key=similar.__getitem__))
    return best


def logits(model: Any, image: Tensor, rows: Tensor) -> Tensor:
    weights = []
    for words in NAMES.values():
        prompt = [START, *rows, *map(token, words), token("."), END]
        weights.append(encode(model.clip, row(model.clip, prompt), len(prompt) - 1))
    return cosines(model, image, weights)


@pytest.mark.parametrize("key", list(SIDES))
def test_equation_and_gradient(key: str) -> None:
    model, image = tiny(key), pictures(SIDES[key])
    tuned = attach(model, "pez", tokens=4)
    perturb(tuned, size=1.0)
    context = tuned.parts["head.prompts"][1].context
    with torch.no_grad():
        context[0] = 3 * table_of(model)[START]  # nearest to a special token
        rows = table_of(model)[nearest(model, context)]
    rows.requires_grad_()
    got, wanted = model(image), logits(model, image, rows)
    torch.testing.assert_close(got, wanted)
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    (left,), (right,) = (torch.autograd.grad((y * weight).sum(), x) for y, x in ((got, context), (wanted, rows)))
    torch.testing.assert_close(left, right)


def test_initial_vectors_are_rows_of_random_or_given_tokens() -> None:
    model = tiny()
    context = attach(model, "pez", tokens=8).parts["head.prompts"][1].context
    ids = [(table_of(model) == vector).all(1).nonzero().flatten().tolist() for vector in context]
    assert all(len(match) == 1 for match in ids)
    assert len({match[0] for match in ids}) > 3
    words = attach(tiny(), "pez", words="a photo").parts["head.prompts"][1].context
    assert torch.equal(words, table_of(model)[[token("a"), token("photo")]])


def test_training_changes_tokens_until_the_prompts_fit() -> None:
    """Gradient descent on the vectors, whose prompts have real tokens at all times."""
    model, image = tiny(), pictures(count=6)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(1)
    tuned = attach(model, "pez", tokens=4)
    adapter = tuned.parts["head.prompts"][1]
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.1, weight_decay=0.1)
    losses, tokens = [], set()
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(image), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        tokens.add(tuple(adapter.nearest()[0].tolist()))
    assert len(tokens) > 3
    assert min(losses) < losses[0] - 0.01


def test_the_last_vectors_are_rows_and_the_file_has_them(tmp_path: Any) -> None:
    model, image = tiny(), pictures()
    tuned = attach(model, "pez", tokens=4)
    perturb(tuned, size=0.3)
    adapter = tuned.parts["head.prompts"][1]
    before, ids = model(image), adapter.nearest()[0]
    for _ in range(2):
        tuned.finalize()
        assert torch.equal(adapter.context, table_of(model)[ids])
        assert torch.equal(model(image), before)
    other = tiny()
    load(other, tuned.save(tmp_path / "prompt"))
    torch.testing.assert_close(other(image), before)


def test_the_reported_text_is_a_template_that_needs_no_file() -> None:
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8}
    clip = open_clip.model.CLIP(embed_dim=4, vision_cfg=vision, text_cfg=text).eval()
    model, image = CLIPClassifier(clip, tokenizer, ["cat", "dog"]).eval(), pictures().float()
    tuned = attach(model, "pez", words="an oil painting of a")
    assert "prompt: an oil painting of a" in str(tuned.report())
    got = model(image)
    tuned.detach()
    plain = CLIPClassifier(clip, tokenizer, ["cat", "dog"], ("an oil painting of a {}.",)).eval()
    torch.testing.assert_close(got, plain(image))


def test_a_tokenizer_without_texts_reports_ids() -> None:
    tuned = attach(tiny(), "pez", words="a photo")
    assert f"prompt: [{token('a')}, {token('photo')}]" in str(tuned.report())


def test_incompatible_arguments_are_named() -> None:
    with raises(OptionError, method="pez", option="tokens", given=0):
        PEZ(tokens=0)
    with raises(UnsupportedSite, method="pez", site="head.prompts") as caught:
        attach(tiny(), "pez", tokens=17)
    assert isinstance(caught.value.__cause__, TextError)


def test_tokens_are_those_of_an_adapted_table() -> None:
    """An adapter on the token embeddings acts as if its update were in the table."""
    model, by_hand, image = tiny(), tiny(), pictures()
    lora = attach(model, "lora", where="embed.token")
    perturb(lora, size=0.5)
    ((_, adapter),) = lora.parts.values()
    with torch.no_grad():
        by_hand.clip.token_embedding.weight.copy_(adapter.weight(table_of(tiny())))
    pair = [attach(m, "pez", words="a photo of") for m in (model, by_hand)]
    pair[1].load_state_dict(pair[0].state_dict())
    torch.testing.assert_close(model(image), by_hand(image))

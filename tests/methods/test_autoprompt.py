"""AutoPrompt against the exchange of single tokens, written out prompt by prompt."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.methods.classifiers import pictures, tiny, token
from tests.methods.test_coop import END, START
from tests.methods.test_pez import logits, table_of
from tests.raising import raises
from veneer.classification.train.batches import ClassifyingLoss
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.class_prompts.autoprompt import AutoPrompt, position_of
from veneer.training.objective.forward_passes import ForwardPasses

LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
STEPS, SIZE, K = 9, 2, 4


class InOrder:
    """Samples in order, again and again."""

    def at(self, number: int) -> tuple[int, int]:
        return divmod(number, len(LABELS))


def train(model: Any, images: Tensor) -> tuple[Any, list[list[int]]]:
    """The tokens after each step of the classifier's own loss and of an optimizer that moves the vectors."""
    torch.manual_seed(3)
    tuned = attach(model, "autoprompt", tokens=4, candidates=K)
    model.train()
    adapter = tuned.parts["head.prompts"][1]

    def batch(samples: Any) -> tuple[Tensor, Tensor]:
        places = [index for _, index in samples]
        return images[places], LABELS[places]

    loss = ClassifyingLoss(model, batch, InOrder(), SIZE, passes=ForwardPasses([tuned]))  # type: ignore[arg-type]
    optimizer, path = torch.optim.SGD(tuned.parameters(), lr=0.5), [adapter.nearest()[0].tolist()]
    for step in range(STEPS):
        loss(step, [0, 1]).backward()
        optimizer.step()
        tuned.after_step(step + 1, STEPS)
        optimizer.zero_grad()
        path.append(adapter.nearest()[0].tolist())
        assert torch.equal(adapter.context, table_of(model)[path[-1]])
    return tuned, path


def reference(images: Tensor, ids: list[int]) -> list[list[int]]:
    """The same tokens: gradient, top-k candidates, their losses on the next batch, exchange."""
    model = tiny().requires_grad_(False)
    table, path, candidates, place = table_of(model), [ids], [], 0
    for step in range(STEPS):
        at = [(step * SIZE + i) % len(LABELS) for i in range(SIZE)]

        def loss(rows: Tensor, at: list[int] = at) -> Tensor:
            return cross_entropy(logits(model, images[at], rows).float(), LABELS[at])

        rows = table[ids].requires_grad_()
        now = loss(rows)
        (gradient,) = torch.autograd.grad(now, rows)
        tried = [[*ids[:place], c, *ids[place + 1 :]] for c in candidates]
        losses = [float(loss(table[other])) for other in tried]
        if losses and min(losses) < now.item():
            ids, candidates = tried[losses.index(min(losses))], []
        else:
            place = position_of(step + 1, 4)
            scores = {i: -float(table[i] @ gradient[place]) for i in range(len(table)) if i not in (START, END, ids[place])}
            candidates = sorted(scores, key=scores.__getitem__, reverse=True)[:K]
        path.append(ids)
    return path


def test_tokens_after_each_step() -> None:
    images = pictures(count=len(LABELS))
    tuned, path = train(tiny(), images)
    expected = reference(images, path[0])
    assert path == expected
    changes = [sum(a != b for a, b in zip(before, after, strict=True)) for before, after in itertools.pairwise(path)]
    assert max(changes) == 1
    assert sum(changes) > 1
    assert tuned.method.passes == 1 + K


def test_an_evaluation_has_the_tokens_and_no_candidate() -> None:
    model, images = tiny(), pictures()
    tuned = attach(model, "autoprompt", words="a photo", candidates=2)
    adapter = tuned.parts["head.prompts"][1]
    adapter.place.fill_(1)
    adapter.choices.fill_(token("red"))
    tuned.begin_pass(0, 0, number=1)
    outputs = [model.train()(images).detach(), model.eval()(images).detach()]
    for words, output in zip((("a", "red"), ("a", "photo")), outputs, strict=True):
        rows = table_of(model)[[token(word) for word in words]]
        torch.testing.assert_close(output, logits(tiny(), images, rows).detach())


def test_a_candidate_whose_loss_is_not_a_number_is_no_choice() -> None:
    tuned = attach(tiny(), "autoprompt", words="a photo", candidates=2)
    adapter = tuned.parts["head.prompts"][1]
    for losses, second in (([2.0, torch.nan, 3.0], "photo"), ([2.0, torch.nan, 1.0], "dog")):
        adapter.place.fill_(1)
        adapter.choices.copy_(torch.tensor([token("red"), token("dog")]))
        tuned.begin_pass(0, 0)
        tuned.compare_passes(torch.tensor(losses))
        tuned.after_step(1, 2)
        assert adapter.nearest()[0].tolist() == [token("a"), token(second)]


def test_positions_are_uniform() -> None:
    counts = torch.tensor([position_of(step, 4) for step in range(400)]).bincount()
    assert counts.min() > 75


def test_options() -> None:
    context = attach(tiny(), "autoprompt", words="a photo").parts["head.prompts"][1].context
    assert torch.equal(context, table_of(tiny())[[token("a"), token("photo")]])
    with raises(OptionError, method="autoprompt", option="candidates", given=0):
        AutoPrompt(candidates=0)
    with raises(OptionError, method="autoprompt", option="candidates", given=62, expected=61):
        attach(tiny(), "autoprompt", tokens=4, candidates=62)

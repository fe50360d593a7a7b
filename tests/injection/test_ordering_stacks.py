"""Stacks of attachments on one layer, random ones included, against the composition of their changes."""

from __future__ import annotations

import contextlib
import copy
import functools
import random

import pytest
import torch

from tests.injection.test_layer_order import DECOMPOSED, PLACES, able, dense, output, put
from tests.injection.toy import net
from veneer.injection import Attachment, UnsupportedSite, attach
from veneer.injection.composition.activation import switch
from veneer.injection.composition.mixed_batch import mixed
from veneer.injection.method import Method
from veneer.testing.snapshot import assert_same, snapshot


@functools.cache
def candidates(place: str) -> list[str | Method]:
    return [*able(PLACES[place]), *(DECOMPOSED if place != "norm" else ())]


def attached(model: torch.nn.Module, place: str, rng: random.Random) -> list[Attachment]:
    """One more attachment, or none if it is rejected."""
    try:
        found = put(model, rng.choice(candidates(place)), PLACES[place])
    except UnsupportedSite:
        return []
    return [found] if found is not None else []


@pytest.mark.parametrize("method", DECOMPOSED, ids=lambda method: method.name)
def test_a_decomposed_change_has_the_norm_of_the_weight_with_an_earlier_lora(method: Method) -> None:
    model = net().double()
    lora, later = put(model, "lora", PLACES["plain"]), put(model, method, PLACES["plain"])
    torch.testing.assert_close(output(model), dense(lora, later))


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_equals_the_composition(seed: int) -> None:
    """Up to four attachments, at any strength; merged in the order of attaching."""
    rng = random.Random(seed)
    place = rng.choice([*PLACES])
    model = net().double()
    there: list[Attachment] = []
    for _ in range(12):
        beside = [a for a in there if not a.merged]
        action = rng.choice(["attach", "attach", "detach", "scale", "merge", "unmerge"])
        if action == "attach" and len(there) < 4:
            there += attached(model, place, rng)
        elif action == "detach" and beside:
            there.remove(gone := rng.choice(beside))
            gone.detach()
        elif action == "scale" and beside:
            rng.choice(beside).scale = rng.choice([0.0, 0.5, 1.0])
        elif action == "merge" and beside:
            beside[0].merge()
        elif action == "unmerge" and len(beside) < len(there):
            there[len(there) - len(beside) - 1].unmerge()
        torch.testing.assert_close(output(model), dense(*there), rtol=0, atol=1e-9)
        assert torch.equal(output(copy.deepcopy(model)), output(model))
    for attachment in reversed(there):
        if attachment.merged:
            attachment.unmerge()
        attachment.detach()
    assert torch.equal(output(model), output(net().double()))


def test_a_batch_cannot_differ_in_what_acts_in_the_weights() -> None:
    model = net()
    lora = put(model, "lora", ("head",))
    put(model, "linear_probe", PLACES["plain"])
    with pytest.raises(UnsupportedSite) as raised, mixed(model, [("lora", "linear_probe"), "linear_probe"]):
        pass
    assert raised.value.site == "head"
    expected = output(model)
    with mixed(model, [("lora", "linear_probe")] * 2):
        torch.testing.assert_close(output(model), expected)
    assert lora.scale == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_mixed_batch_equals_each_sample_alone(seed: int) -> None:
    """Or it is rejected, because something acts in weights of all samples."""
    rng = random.Random(seed)
    place = rng.choice(["plain", "sliced", "conv"])
    model = net().double()
    there = [put(model, "lora", PLACES[place]), *attached(model, place, rng), *attached(model, place, rng)]
    samples = [[a for a in there if rng.random() < 0.7] for _ in output(model)]
    expected = []
    for i, sample in enumerate(samples):
        with switch({a: (1.0, a in sample) for a in there}):
            expected.append(output(model)[i])
    with contextlib.suppress(UnsupportedSite), mixed(model, samples):
        torch.testing.assert_close(output(model), torch.stack(expected), rtol=0, atol=1e-9)


def test_a_quantized_weight_cannot_take_an_earlier_change() -> None:
    """SSF changes weight and bias together, so a later bias needs SSF's weight form too, which a quantized weight cannot take."""
    model = net()
    model.head.weight = torch.nn.Parameter(torch.ones(3, 6, dtype=torch.int8), requires_grad=False)
    attach(model, "ssf", where="head")
    before = snapshot(model)
    with pytest.raises(UnsupportedSite) as raised:
        attach(model, "full", where="bias.head")
    assert raised.value.site.startswith("head")
    assert_same(before, snapshot(model), "rejected")

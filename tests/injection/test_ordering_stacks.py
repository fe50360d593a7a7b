"""Several attachments on one layer, also random ones, against the composition of their changes."""

from __future__ import annotations

import contextlib
import copy
import functools
import random

import pytest
import torch

from tests.injection.test_layer_order import (
    DECOMPOSED,
    SELECTIONS,
    attach_with_noise,
    dense_output,
    methods_with_weight_form,
    output,
)
from tests.injection.toy import net
from veneer.injection import Attachment, UnsupportedSite, attach
from veneer.injection.composition.activation import set_switches
from veneer.injection.composition.mixed_batch import mixed
from veneer.injection.method import Method
from veneer.testing.snapshot import assert_same, snapshot


@functools.cache
def candidates(selection: str) -> list[str | Method]:
    return [*methods_with_weight_form(SELECTIONS[selection]), *(DECOMPOSED if selection != "norm" else ())]


def attach_random(model: torch.nn.Module, selection: str, rng: random.Random) -> list[Attachment]:
    """Attaches a random method. Returns it in a list, which is empty if the attach is rejected."""
    try:
        attachment = attach_with_noise(model, rng.choice(candidates(selection)), SELECTIONS[selection])
    except UnsupportedSite:
        return []
    return [attachment] if attachment is not None else []


@pytest.mark.parametrize("method", DECOMPOSED, ids=lambda method: method.name)
def test_a_decomposed_change_has_the_norm_of_the_weight_with_an_earlier_lora(method: Method) -> None:
    model = net().double()
    lora, later = attach_with_noise(model, "lora", SELECTIONS["plain"]), attach_with_noise(model, method, SELECTIONS["plain"])
    torch.testing.assert_close(output(model), dense_output(lora, later))


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_equals_the_composition(seed: int) -> None:
    """Up to four attachments, at any strength; merged in the order of attaching."""
    rng = random.Random(seed)
    selection = rng.choice([*SELECTIONS])
    model = net().double()
    attached: list[Attachment] = []
    for _ in range(12):
        unmerged = [a for a in attached if not a.merged]
        action = rng.choice(["attach", "attach", "detach", "scale", "merge", "unmerge"])
        if action == "attach" and len(attached) < 4:
            attached += attach_random(model, selection, rng)
        elif action == "detach" and unmerged:
            attached.remove(removed := rng.choice(unmerged))
            removed.detach()
        elif action == "scale" and unmerged:
            rng.choice(unmerged).scale = rng.choice([0.0, 0.5, 1.0])
        elif action == "merge" and unmerged:
            unmerged[0].merge()
        elif action == "unmerge" and len(unmerged) < len(attached):
            attached[len(attached) - len(unmerged) - 1].unmerge()
        torch.testing.assert_close(output(model), dense_output(*attached), rtol=0, atol=1e-9)
        assert torch.equal(output(copy.deepcopy(model)), output(model))
    for attachment in reversed(attached):
        if attachment.merged:
            attachment.unmerge()
        attachment.detach()
    assert torch.equal(output(model), output(net().double()))


def test_adapters_in_the_weights_must_be_the_same_for_the_batch() -> None:
    model = net()
    lora = attach_with_noise(model, "lora", ("head",))
    attach_with_noise(model, "linear_probe", SELECTIONS["plain"])
    with pytest.raises(UnsupportedSite) as raised, mixed(model, [("lora", "linear_probe"), "linear_probe"]):
        pass
    assert raised.value.site == "head"
    expected = output(model)
    with mixed(model, [("lora", "linear_probe")] * 2):
        torch.testing.assert_close(output(model), expected)
    assert lora.scale == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_mixed_batch_equals_each_sample_alone(seed: int) -> None:
    """Or it is rejected, because adapters are applied in the weights, for all samples."""
    rng = random.Random(seed)
    selection = rng.choice(["plain", "sliced", "conv"])
    model = net().double()
    attached = [
        attach_with_noise(model, "lora", SELECTIONS[selection]),
        *attach_random(model, selection, rng),
        *attach_random(model, selection, rng),
    ]
    samples = [[a for a in attached if rng.random() < 0.7] for _ in output(model)]
    expected = []
    for i, sample in enumerate(samples):
        with set_switches({a: (1.0, a in sample) for a in attached}):
            expected.append(output(model)[i])
    with contextlib.suppress(UnsupportedSite), mixed(model, samples):
        torch.testing.assert_close(output(model), torch.stack(expected), rtol=0, atol=1e-9)


def test_an_earlier_change_of_a_quantized_weight_is_rejected() -> None:
    """SSF changes weight and bias together, so a later bias needs SSF's weight form too, which a quantized weight cannot take."""
    model = net()
    model.head.weight = torch.nn.Parameter(torch.ones(3, 6, dtype=torch.int8), requires_grad=False)
    attach(model, "ssf", where="head")
    before = snapshot(model)
    with pytest.raises(UnsupportedSite) as raised:
        attach(model, "full", where="bias.head")
    assert raised.value.site.startswith("head")
    assert_same(before, snapshot(model), "rejected")

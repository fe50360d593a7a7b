"""Inside `defer_init` nothing is drawn that would only be overwritten."""

from __future__ import annotations

import torch
from torch import nn

from tests.injection.toy import net
from veneer.injection import attach
from veneer.injection.attachment.deferred_init import SkipInit, defer_init, zeros


def test_parameters_are_left_undrawn_and_other_tensors_are_not() -> None:
    parameter, tensor = nn.Parameter(torch.full((4, 4), 7.0)), torch.full((4, 4), 7.0)
    with SkipInit(), torch.no_grad():
        for draw in (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, nn.init.xavier_normal_):
            draw(parameter)
        parameter.normal_()
        nn.init.ones_(tensor)
        tensor.normal_()
    assert torch.equal(parameter, torch.full((4, 4), 7.0))
    assert len(tensor.unique()) > 8


def test_an_attach_that_is_filled_draws_no_numbers() -> None:
    state = torch.get_rng_state()
    with defer_init():
        attach(net(), "lora", where="attn.q", rank=2)
    assert torch.equal(torch.get_rng_state(), state)
    attach(net(), "lora", where="attn.q", rank=2)
    assert not torch.equal(torch.get_rng_state(), state)


def test_an_attach_on_meta_draws_no_numbers_and_is_on_meta() -> None:
    state = torch.get_rng_state()
    attached = attach(net().to("meta"), "lora", where="attn.q", rank=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {(p.device.type, p.requires_grad) for p in attached.parameters()} == {("meta", True)}


def test_zeros_are_zeros_unless_values_follow() -> None:
    assert torch.equal(zeros(3, 2), torch.tensor([[0.0, 0.0]] * 3))
    with defer_init():
        assert zeros(3, 2).shape == (3, 2)

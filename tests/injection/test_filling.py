"""Inside `filling` nothing is drawn that would only be overwritten."""

from __future__ import annotations

import torch
from torch import nn

from veneer.injection import attach
from veneer.injection.filling import Undrawn, filling

from .toy import net


def test_parameters_are_left_undrawn_and_other_tensors_are_not() -> None:
    parameter, tensor = nn.Parameter(torch.full((4, 4), 7.0)), torch.full((4, 4), 7.0)
    with Undrawn(), torch.no_grad():
        for draw in (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, nn.init.xavier_normal_):
            draw(parameter)
        parameter.normal_()
        nn.init.ones_(tensor)
        tensor.normal_()
    assert torch.equal(parameter, torch.full((4, 4), 7.0))
    assert len(tensor.unique()) > 8


def test_an_attach_that_is_filled_draws_no_numbers() -> None:
    state = torch.get_rng_state()
    with filling():
        attach(net(), "lora", where="attn.q", rank=2)
    assert torch.equal(torch.get_rng_state(), state)
    attach(net(), "lora", where="attn.q", rank=2)
    assert not torch.equal(torch.get_rng_state(), state)

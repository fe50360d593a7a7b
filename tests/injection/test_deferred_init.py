"""`defer_init` skips initial values that a checkpoint overwrites."""

from __future__ import annotations

import torch
from torch import nn

from tests.injection.toy import net
from veneer.injection import attach
from veneer.injection.attachment.deferred_init import SkipInit, defer_init, zeros


def test_only_the_initialization_of_parameters_is_skipped() -> None:
    parameter, tensor = nn.Parameter(torch.full((4, 4), 7.0)), torch.full((4, 4), 7.0)
    with SkipInit(), torch.no_grad():
        for init in (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, nn.init.xavier_normal_):
            init(parameter)
        parameter.normal_()
        nn.init.ones_(tensor)
        tensor.normal_()
    assert torch.equal(parameter, torch.full((4, 4), 7.0))
    assert len(tensor.unique()) > 8


def test_a_deferred_attach_uses_no_random_numbers() -> None:
    state = torch.get_rng_state()
    with defer_init():
        attach(net(), "lora", where="attn.q", rank=2)
    assert torch.equal(torch.get_rng_state(), state)
    attach(net(), "lora", where="attn.q", rank=2)
    assert not torch.equal(torch.get_rng_state(), state)


def test_an_attach_on_meta_uses_no_random_numbers_and_is_on_meta() -> None:
    state = torch.get_rng_state()
    attached = attach(net().to("meta"), "lora", where="attn.q", rank=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {(p.device.type, p.requires_grad) for p in attached.parameters()} == {("meta", True)}


def test_zeros_are_uninitialized_inside_defer_init() -> None:
    assert torch.equal(zeros(3, 2), torch.tensor([[0.0, 0.0]] * 3))
    with defer_init():
        assert zeros(3, 2).shape == (3, 2)

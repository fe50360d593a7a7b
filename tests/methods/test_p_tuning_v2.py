"""P-Tuning v2: what it has in common with Prefix-Tuning, its own defaults, and the authors' encoder written out."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.bottlenecks import picture, stirred, tiny
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.soft_prompts.p_tuning_v2 import PTuningV2


class Encoder(nn.Module):
    """One table (p, 2·layers·width), or table, linear, tanh and one linear for all layers; keys and values of layer i are the
    parts 2 i and 2 i + 1."""

    def __init__(self, adapters: list[Any]) -> None:
        super().__init__()
        self.adapters = adapters

    def forward(self) -> Tensor:
        if self.adapters[0].out is None:
            return torch.cat([table for a in self.adapters for table in (a.keys, a.values)], -1)
        shared = self.adapters[0].shared
        weight, bias = (torch.cat([getattr(a.out, name) for a in self.adapters]) for name in ("weight", "bias"))
        return nn.functional.linear(shared.layer(shared.table).tanh(), weight, bias)


@pytest.mark.parametrize("hidden", [0, 5])
def test_the_tables_of_all_layers(hidden: int) -> None:
    """In evaluation the function is that of `prefix_tuning` with the same tensors; in training dropout acts on the tables."""
    model, other, x = tiny(), tiny(), picture()
    tuned, prefix = attach(model, "p_tuning_v2", tokens=3, hidden=hidden), attach(other, "prefix_tuning", tokens=3, hidden=hidden)
    adapters: list[Any] = list(stirred(tuned).values())
    prefix.load_state_dict(tuned.state_dict())
    assert torch.equal(model(x), other(x))
    parts = Encoder(adapters)().unflatten(-1, (4, 24))
    for i, adapter in enumerate(adapters):
        for j, table in enumerate(adapter.tables()):
            torch.testing.assert_close(table, parts[:, 2 * i + j])
        keys = adapter.train().keys_values()[0].transpose(0, 1).flatten(1)
        kept = keys != 0
        torch.testing.assert_close(keys[kept], (parts[:, 2 * i] / 0.9)[kept])
    assert not all((a.keys_values()[0] != 0).all() for a in adapters for _ in range(3))
    tuned.finalize()
    assert tuned.method == PTuningV2(tokens=3, hidden=0)
    torch.testing.assert_close(model.eval()(x), other(x))


def test_defaults_and_counts() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    assert attach(vit, "p_tuning_v2").report().trainable == 73_728
    assert attach(vit, "p_tuning_v2", name="long", tokens=128).report().trainable == 2_359_296
    assert PTuningV2.learning_rate == 5e-3
    with raises(OptionError, method="p_tuning_v2", option="dropout", given=-0.1):
        PTuningV2(dropout=-0.1)

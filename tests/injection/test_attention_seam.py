"""The processor seam on a real attention module of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.raising import raises
from veneer.injection import HostChanged, attach
from veneer.injection.attention_sites import AttentionSite
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.registry import hosts
from veneer.testing.snapshot import assert_same, snapshot


class ShiftAdapter(Adapter):
    """Attention of the input plus a trained shift, blended by the seam."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(width))

    def attend(self, inner: Any, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(attn, hidden_states + self.shift, *args, **kwargs)


@dataclass(frozen=True)
class Shift(Method):
    """Shifts the input of an attention module."""

    name: ClassVar[str] = "shift"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[Need, ...]] = (Need(AttentionSite),)
    default: ClassVar[tuple[str, ...]] = ("attn.processor",)

    def build(self, site: AttentionSite) -> Adapter:
        return ShiftAdapter(site.width)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return hosts.get("diffusers_dit")().tiny()["dit"]().eval().requires_grad_(False)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**hosts.get("diffusers_dit")().sample(model)).sample


def shifted(*shifts: dict[str, Tensor]) -> Tensor:
    """The output of the bare model with shifted attention inputs."""
    model = tiny()
    for path in shifts[0]:
        total = sum(s[path] for s in shifts)
        model.get_submodule(path).register_forward_pre_hook(lambda m, args, total=total: (args[0] + total, *args[1:]))
    return run(model)


def shifts(tuned: Any) -> dict[str, Tensor]:
    return {site.path: adapter.shift.detach() for site, adapter in tuned.parts.values()}


def test_the_adapter_wraps_the_processor_in_place() -> None:
    model = tiny()
    before, host = snapshot(model), run(model)
    tuned = attach(model, Shift(), sample=True)
    assert list(tuned.parts) == [f"transformer_blocks.{i}.attn1.processor" for i in range(2)]
    torch.testing.assert_close(run(model), shifted(shifts(tuned)))
    with tuned.enabled(False):
        assert torch.equal(run(model), host)
    tuned.detach()
    assert_same(before, snapshot(model), "detach")


@pytest.mark.parametrize("first", [0, 1])
def test_wrapped_twice_and_taken_off_in_any_order(first: int) -> None:
    model = tiny()
    before = snapshot(model)
    both = [attach(model, Shift()) for _ in range(2)]
    torch.testing.assert_close(run(model), shifted(*map(shifts, both)))
    both[first].detach()
    both[1 - first].check()
    torch.testing.assert_close(run(model), shifted(shifts(both[1 - first])))
    both[1 - first].detach()
    assert_same(before, snapshot(model), "detach")


def test_a_processor_that_the_user_sets_later_is_noticed() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model = tiny()
    attach(model, Shift())
    model.transformer_blocks[1].attn1.set_processor(AttnProcessor())
    with raises(HostChanged, where="transformer_blocks.1.attn1.processor", given="replaced"):
        run(model)

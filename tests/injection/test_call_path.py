"""The stack frames between the hook of a called layer and the adapter."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import veneer
from tests.injection.toy import net, run, stir
from veneer.injection import attach
from veneer.injection.composition.mixed_batch import mixed
from veneer.injection.method import Adapter
from veneer.injection.seams.adapter_calls import call_blended, call_in_place, call_input, call_of, call_output
from veneer.injection.seams.call_seam import CallSeam

PACKAGE = str(Path(veneer.__file__).parent)


class Doubled(Adapter):
    """2 y, blended by the seam."""

    def output(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2 * y


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The functions of this package on the stack of each `F.linear` that an adapter calls, outermost first."""
    calls: list[list[str]] = []
    linear = F.linear

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        names = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        if names:
            calls.append(names)
        return linear(*args, **kwargs)

    monkeypatch.setattr(F, "linear", spy)
    return calls


def test_a_plain_lora_is_at_most_six_frames_below_its_hook(stacks: list[list[str]]) -> None:
    """Hook, seam, adapter, and the kernel of the adapter."""
    model = net()
    attach(model, "lora", where="head", rank=2)
    run(model)
    assert stacks == [["_write_output", "call_in_place", "output", "_low", "project", "forward"]]


def test_slices_and_mixed_batches_have_other_call_paths(stacks: list[list[str]]) -> None:
    model = net()
    sliced = attach(model, "lora", where="attn.q", rank=2, name="sliced")
    plain, other = (attach(model, "lora", where="head", rank=2, name=name) for name in ("plain", "other"))
    for tuned in (sliced, plain, other):
        stir(tuned)
    (seam,) = plain.seams
    assert isinstance(seam, CallSeam)
    assert seam.direct is call_in_place
    run(model)
    assert sorted(stack[1] for stack in stacks) == ["apply_adapters", "call_in_place", "call_in_place"]
    with mixed(model, ["plain", "other"]):
        assert seam.direct is None
    assert seam.direct is call_in_place


def test_the_call_is_chosen_by_the_forms_and_flags_of_an_adapter() -> None:
    model = net()
    options: dict[str, dict[str, Any]] = {"lora": {"rank": 2}, "dora": {"rank": 2}, "ia3": {"inputs": "head"}}
    calls = {name: call_of(attach(model, name, where="head", **given).parts["head"][1]) for name, given in options.items()}
    assert calls == {"lora": call_in_place, "dora": call_output, "ia3": call_input}
    assert call_of(Doubled()) is call_blended

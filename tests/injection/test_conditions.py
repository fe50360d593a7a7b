"""Conditions of a scope: which row of a batch gets which picture, and in which steps they act."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import veneer
from tests.raising import raises
from veneer.injection.conditions import Conditions, place
from veneer.injection.errors import ConditionError
from veneer.testing.pipelines import tiny_pipeline


class Pipeline:
    """Says of itself what pipelines of diffusers say."""

    def __init__(self, guidance: float | None, timesteps: list[int] | None = None) -> None:
        if guidance is not None:
            self._guidance_scale = guidance
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(timesteps or [0]))

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1


def rows(pictures: int, batch: int, guidance: float | None) -> list[int]:
    pipe = None if guidance is None else Pipeline(guidance)
    given = Conditions("it", {"image": torch.arange(pictures)}, {}, pipeline=pipe)
    return given.at(batch, 0, torch.device("cpu")).values["image"].tolist()


@pytest.mark.parametrize(
    ("pictures", "batch", "guidance", "expected"),
    [
        (1, 3, None, [0, 0, 0]),
        (3, 3, None, [0, 1, 2]),
        (1, 2, 4.0, [0, 0]),
        (2, 4, 4.0, [0, 1, 0, 1]),
        (2, 4, 1.0, [0, 0, 1, 1]),
        (2, 8, 4.0, [0, 0, 1, 1, 0, 0, 1, 1]),
    ],
)
def test_each_row_gets_its_prompts_picture(pictures: int, batch: int, guidance: float | None, expected: list[int]) -> None:
    assert rows(pictures, batch, guidance) == expected


@pytest.mark.parametrize(("pictures", "batch", "guidance"), [(2, 3, None), (3, 4, 4.0), (1, 3, 4.0)])
def test_a_batch_that_cannot_be_shared_out_is_refused(pictures: int, batch: int, guidance: float | None) -> None:
    with raises(ConditionError, where="it", given=pictures, expected=batch if guidance is None else batch // 2):
        rows(pictures, batch, guidance)


def test_the_half_without_a_prompt_is_told() -> None:
    given = Conditions("it", {"image": torch.zeros(1)}, {}, pipeline=Pipeline(3.0))
    now = given.at(4, 0, torch.device("cpu"))
    assert now.conditioned is not None
    assert now.conditioned.tolist() == [False, False, True, True]
    assert now.conditioned_rows() == slice(2, None)


def acting(start: float, end: float, calls: list[int], timesteps: list[int]) -> list[bool]:
    given = Conditions("it", {"image": torch.zeros(1)}, {}, start=start, end=end, pipeline=Pipeline(1.0, timesteps))
    return [given.at(1, torch.tensor(t), torch.device("cpu")).strength == 1 for t in calls]


def test_it_acts_from_start_to_end_counted_from_where_a_run_begins() -> None:
    steps = [90, 70, 50, 30, 10]
    assert acting(0.0, 1.0, steps, steps) == [True] * 5
    assert acting(0.2, 0.8, steps, steps) == [False, True, True, True, False]
    assert acting(0.0, 0.5, steps[1:] * 2, steps) == [True, True, False, False] * 2, "a run that begins later, twice"
    assert acting(0.0, 0.5, [90, 90, 70, 70, 50, 50], steps) == [True, True, True, True, False, False], "two calls a step"


def test_a_scheduler_that_counts_is_believed() -> None:
    scheduler = SimpleNamespace(timesteps=torch.tensor([9, 5, 5, 1]), step_index=2)
    assert place(scheduler, 5) == 2
    scheduler.step_index = None
    assert place(scheduler, torch.tensor([5, 5])) == 1


@pytest.mark.parametrize(("start", "end"), [(-0.1, 1.0), (0.5, 0.4), (0.0, 1.1)])
def test_no_part_of_the_schedule_is_refused(start: float, end: float) -> None:
    with raises(ConditionError, where="it", given=(start, end)):
        Conditions("it", {}, {}, start=start, end=end)


def test_what_an_earlier_run_said_is_not_believed() -> None:
    pipe = Pipeline(4.0)
    given = Conditions("it", {"image": torch.zeros(1)}, {}, pipeline=pipe)
    given.open()
    with raises(ConditionError, where="it", expected="Pipeline"):
        given.at(2, 0, torch.device("cpu"))
    given.close()
    assert pipe._guidance_scale == 4.0, "as it was"
    given.open()
    pipe._guidance_scale = 1.0
    given.close()
    assert pipe._guidance_scale == 1.0, "what it said since"


def test_part_of_the_schedule_needs_a_schedule() -> None:
    given = Conditions("it", {"image": torch.zeros(1)}, {}, end=0.5)
    with raises(ConditionError, where="it", given=(0.0, 0.5), expected="schedule"):
        given.at(1, 0, torch.device("cpu"))


def test_a_pipeline_that_is_no_more_is_said() -> None:
    pipe = tiny_pipeline("sd")
    unet, control = pipe.unet, veneer.attach(pipe, "controlnet")
    del pipe
    gc.collect()
    with raises(ConditionError, where="controlnet", expected="pipeline"):
        control.condition(image=torch.rand(1, 3, 32, 32))
    with control.condition(image=torch.rand(1, 3, 32, 32), pipeline=unet):
        unet(torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 5, 24))


def test_scopes_nest_and_leave_nothing_behind() -> None:
    unet = tiny_pipeline("sd").unet
    control = veneer.attach(unet, "controlnet")
    for p in control.parameters():
        torch.nn.init.normal_(p, std=0.1)
    call = (torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 5, 24))
    a, b = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)

    def out() -> Any:
        with torch.no_grad():
            return unet(*call).sample

    with control.condition(image=a):
        outer = out()
        with control.condition(image=b):
            assert not torch.equal(out(), outer)
        assert torch.equal(out(), outer)
    with raises(ConditionError, where="controlnet", given=(), expected=("image", "guess")):
        out()
    with pytest.raises(RuntimeError, match="stop"), control.condition(image=a):
        raise RuntimeError("stop")
    assert control.conditions is None


def test_a_copy_of_what_has_run_has_no_conditions_of_its_own() -> None:
    unet = tiny_pipeline("sd").unet
    control = veneer.attach(unet, "t2i_adapter")
    with control.condition(image=torch.rand(1, 3, 64, 64)):
        unet(torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 5, 24)).sample.mean().backward()
        copied = copy.deepcopy(unet)
    seam = next(m for name, m in copied.named_modules() if name == "veneer_t2i_adapter")
    assert seam.adapters[0].call.conditions is None

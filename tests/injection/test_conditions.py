"""Conditions of a scope: the image of each batch row, and the active steps."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import veneer
from tests.raising import raises
from veneer.injection.conditions import Conditions, step_index
from veneer.injection.errors import ConditionError
from veneer.testing.pipelines import tiny_pipeline


class Pipeline:
    """Has the guidance attributes of a diffusers pipeline."""

    def __init__(self, guidance: float | None, timesteps: list[int] | None = None) -> None:
        if guidance is not None:
            self._guidance_scale = guidance
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(timesteps or [0]))

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1


def image_rows(images: int, batch: int, guidance: float | None) -> list[int]:
    pipe = None if guidance is None else Pipeline(guidance)
    conditions = Conditions("it", {"image": torch.arange(images)}, {}, pipeline=pipe)
    return conditions.at(batch, 0, torch.device("cpu")).values["image"].tolist()


@pytest.mark.parametrize(
    ("images", "batch", "guidance", "expected"),
    [
        (1, 3, None, [0, 0, 0]),
        (3, 3, None, [0, 1, 2]),
        (1, 2, 4.0, [0, 0]),
        (2, 4, 4.0, [0, 1, 0, 1]),
        (2, 4, 1.0, [0, 0, 1, 1]),
        (2, 8, 4.0, [0, 0, 1, 1, 0, 0, 1, 1]),
    ],
)
def test_each_row_gets_the_image_of_its_prompt(images: int, batch: int, guidance: float | None, expected: list[int]) -> None:
    assert image_rows(images, batch, guidance) == expected


@pytest.mark.parametrize(("images", "batch", "guidance"), [(2, 3, None), (3, 4, 4.0), (1, 3, 4.0)])
def test_a_batch_that_is_not_divisible_is_rejected(images: int, batch: int, guidance: float | None) -> None:
    with raises(ConditionError, where="it", given=images, expected=batch if guidance is None else batch // 2):
        image_rows(images, batch, guidance)


def test_the_unconditional_half_is_marked() -> None:
    conditions = Conditions("it", {"image": torch.zeros(1)}, {}, pipeline=Pipeline(3.0))
    call = conditions.at(4, 0, torch.device("cpu"))
    assert call.conditioned is not None
    assert call.conditioned.tolist() == [False, False, True, True]
    assert call.conditioned_rows() == slice(2, None)


def active_steps(start: float, end: float, calls: list[int], timesteps: list[int]) -> list[bool]:
    conditions = Conditions("it", {"image": torch.zeros(1)}, {}, start=start, end=end, pipeline=Pipeline(1.0, timesteps))
    return [conditions.at(1, torch.tensor(t), torch.device("cpu")).strength == 1 for t in calls]


def test_start_and_end_count_from_the_first_step_of_a_run() -> None:
    steps = [90, 70, 50, 30, 10]
    assert active_steps(0.0, 1.0, steps, steps) == [True] * 5
    assert active_steps(0.2, 0.8, steps, steps) == [False, True, True, True, False]
    assert active_steps(0.0, 0.5, steps[1:] * 2, steps) == [True, True, False, False] * 2, "a run that begins later, twice"
    assert active_steps(0.0, 0.5, [90, 90, 70, 70, 50, 50], steps) == [True, True, True, True, False, False], "two calls a step"


def test_the_step_index_of_a_scheduler_takes_precedence() -> None:
    scheduler = SimpleNamespace(timesteps=torch.tensor([9, 5, 5, 1]), step_index=2)
    assert step_index(scheduler, 5) == 2
    scheduler.step_index = None
    assert step_index(scheduler, torch.tensor([5, 5])) == 1


@pytest.mark.parametrize(("start", "end"), [(-0.1, 1.0), (0.5, 0.4), (0.0, 1.1)])
def test_an_invalid_part_of_the_schedule_is_rejected(start: float, end: float) -> None:
    with raises(ConditionError, where="it", given=(start, end)):
        Conditions("it", {}, {}, start=start, end=end)


def test_the_guidance_of_an_earlier_run_is_ignored() -> None:
    pipe = Pipeline(4.0)
    conditions = Conditions("it", {"image": torch.zeros(1)}, {}, pipeline=pipe)
    conditions.open()
    with raises(ConditionError, where="it", expected="Pipeline"):
        conditions.at(2, 0, torch.device("cpu"))
    conditions.close()
    assert pipe._guidance_scale == 4.0, "restored"
    conditions.open()
    pipe._guidance_scale = 1.0
    conditions.close()
    assert pipe._guidance_scale == 1.0, "set since"


def test_part_of_the_schedule_needs_a_schedule() -> None:
    conditions = Conditions("it", {"image": torch.zeros(1)}, {}, end=0.5)
    with raises(ConditionError, where="it", given=(0.0, 0.5), expected="schedule"):
        conditions.at(1, 0, torch.device("cpu"))


def test_a_garbage_collected_pipeline_is_an_error() -> None:
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
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 5, 24))
    a, b = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)

    def output() -> Any:
        with torch.no_grad():
            return unet(*inputs).sample

    with control.condition(image=a):
        outer = output()
        with control.condition(image=b):
            assert not torch.equal(output(), outer)
        assert torch.equal(output(), outer)
    with raises(ConditionError, where="controlnet", given=(), expected=("image", "guess")):
        output()
    with pytest.raises(RuntimeError, match="stop"), control.condition(image=a):
        raise RuntimeError("stop")
    assert control.conditions is None


def test_a_copy_has_no_conditions() -> None:
    unet = tiny_pipeline("sd").unet
    control = veneer.attach(unet, "t2i_adapter")
    with control.condition(image=torch.rand(1, 3, 64, 64)):
        unet(torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 5, 24)).sample.mean().backward()
        copied = copy.deepcopy(unet)
    seam = next(m for name, m in copied.named_modules() if name == "veneer_t2i_adapter")
    assert seam.adapters[0].call.conditions is None

"""Learning-rate schedules: closed forms, the floor, and the same functions of diffusers and transformers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.optimization import get_scheduler
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from tests.raising import raises
from veneer.training.loop.config import TrainConfig
from veneer.training.loop.errors import TrainError
from veneer.training.loop.schedule import SCHEDULES, Schedule

STEPS, WARMUP = 20, 5
CLOSED_FORMS = {
    "constant": lambda p: 1.0,
    "constant_with_warmup": lambda p: 1.0,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: math.cos(math.pi * p / 2) ** 2,
    "cosine_with_restarts": lambda p: math.cos(math.pi * ((3 * p) % 1) / 2) ** 2,
    "polynomial": lambda p: (1 - p) ** 2.5,
    "rex": lambda p: (1 - p) / (1 - p / 2),
}


def factors(name, warmup=WARMUP, **options):
    config = TrainConfig(steps=STEPS, warmup=warmup, schedule=name, **options)
    return [config.rate(step) for step in range(STEPS)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_schedules_equal_their_closed_forms(name, floor):
    """The warm-up is linear to 1; the floor scales what follows to [floor, 1]."""
    decay = [floor + (1 - floor) * CLOSED_FORMS[name]((s - WARMUP) / (STEPS - WARMUP)) for s in range(WARMUP, STEPS)]
    warmup = [(s + 1) / WARMUP for s in range(WARMUP)]
    assert factors(name, cycles=3, power=2.5, min_lr_ratio=floor) == pytest.approx([*warmup, *decay])


def reference(make, count):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", sorted({*SCHEDULES} - {"rex"}))
def test_schedules_equal_those_of_diffusers_after_the_warmup(name):
    """Of one name with one cycle count and power; polynomial ends there at lr_end, 1e-7."""
    theirs = reference(
        lambda o: get_scheduler(
            name, o, num_warmup_steps=WARMUP, num_training_steps=STEPS, num_cycles=2, power=2.0
        ) if name != "cosine" else get_scheduler(name, o, num_warmup_steps=WARMUP, num_training_steps=STEPS),
        STEPS,
    )  # fmt: skip
    assert factors(name, cycles=2, power=2.0)[WARMUP:] == pytest.approx(theirs[WARMUP:], abs=2e-7)


def test_the_floor_of_cosine_is_that_of_transformers():
    make = get_cosine_with_min_lr_schedule_with_warmup
    theirs = reference(lambda o: make(o, WARMUP, STEPS, min_lr_rate=0.2), STEPS)
    assert factors("cosine", min_lr_ratio=0.2)[WARMUP:] == pytest.approx(theirs[WARMUP:])


@pytest.mark.parametrize("name", sorted({*SCHEDULES} - {"constant", "constant_with_warmup"}))
def test_schedules_end_at_the_floor_and_stay_there(name):
    schedule = Schedule(name, 0, STEPS, cycles=2, min_lr_ratio=0.3)
    assert schedule.factor(STEPS) == schedule.factor(STEPS + 5) == pytest.approx(0.3)
    assert schedule.factor(0) == 1.0


def test_restarts_return_to_the_peak():
    rates = factors("cosine_with_restarts", warmup=0, cycles=4)
    assert [step for step, rate in enumerate(rates) if rate == pytest.approx(1.0)] == [0, 5, 10, 15]


@pytest.mark.parametrize(
    ("options", "where", "given"),
    [({"cycles": 0}, "cycles", 0), ({"power": -1.0}, "power", -1.0), ({"min_lr_ratio": 1.5}, "min_lr_ratio", 1.5),
     ({"schedule": "triangle"}, "schedule", "triangle")],
)  # fmt: skip
def test_options_out_of_range_are_rejected(options, where, given):
    with raises(TrainError, where=where, given=given):
        TrainConfig(**options)


def test_options_of_a_schedule_must_match_on_resume_only_if_set():
    assert {"cycles", "power", "min_lr_ratio", "optimizer_args"} & {*TrainConfig().identity()} == set()
    changed = TrainConfig(schedule="polynomial", power=2.0, min_lr_ratio=0.1, optimizer_args={"eps": 1e-6})
    assert {"power", "min_lr_ratio", "optimizer_args"} <= {*changed.identity()}
    assert "steps" not in TrainConfig(schedule="constant_with_warmup").identity()
    assert "steps" in changed.identity()

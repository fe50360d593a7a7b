"""Schedulers by name keep the noise schedule and the prediction type of the base model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import diffusers
import pytest
import torch

from veneer.base_models.schedulers import CLASSES, Scheduler, other_scheduler
from veneer.injection.errors import OptionError

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
FLOW = [name for name in CLASSES if name.startswith("flow")]


def test_every_name_has_a_class_of_diffusers() -> None:
    assert {*get_args(Scheduler)} == {*CLASSES}
    assert all(hasattr(diffusers, kind) for kind, _ in CLASSES.values())


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of diffusers with NumPy 2
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in FLOW])
def test_a_scheduler_denoises_with_the_schedule_of_the_base_model(name: Scheduler) -> None:
    """With the exact v of a known image at every step, the last sample is that image."""
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=True))
    pipe.scheduler = other_scheduler(pipe.scheduler, name)
    kind, settings = CLASSES[name]
    assert type(pipe.scheduler).__name__ == kind
    assert {key: pipe.scheduler.config[key] for key in {**NOISE, **settings}} == {**NOISE, **settings}
    generator, image = torch.Generator().manual_seed(0), torch.full((1, 1, 4, 4), 0.5)
    pipe.scheduler.set_timesteps(30)
    sample = torch.randn(image.shape, generator=generator) * pipe.scheduler.init_noise_sigma
    alphas = pipe.scheduler.alphas_cumprod
    for time in pipe.scheduler.timesteps:
        seen = pipe.scheduler.scale_model_input(sample, time)
        alpha = _interpolated(alphas, float(time))
        noise = (seen - alpha.sqrt() * image) / (1 - alpha).sqrt()
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * image
        extra = {"generator": generator} if "generator" in pipe.scheduler.step.__code__.co_varnames else {}
        sample = pipe.scheduler.step(v, time, sample, **extra).prev_sample
    assert (sample - image).abs().max() < 0.15


def _interpolated(alphas: torch.Tensor, time: float) -> torch.Tensor:
    low = int(time)
    high = min(low + 1, len(alphas) - 1)
    return alphas[low] + (time - low) * (alphas[high] - alphas[low])


@pytest.mark.parametrize("name", FLOW)
def test_flow_matching_keeps_its_shift(name: Scheduler) -> None:
    pipe = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.scheduler = other_scheduler(pipe.scheduler, name)
    assert (type(pipe.scheduler).__name__, pipe.scheduler.config.shift) == (CLASSES[name][0], 3.0)


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [(diffusers.DDIMScheduler(), "flow_euler"), (diffusers.FlowMatchEulerDiscreteScheduler(), "euler")],
)
def test_a_scheduler_of_the_other_kind_is_rejected_with_those_that_fit(scheduler: object, name: Scheduler) -> None:
    pipe = SimpleNamespace(scheduler=scheduler)
    with pytest.raises(OptionError) as error:
        pipe.scheduler = other_scheduler(pipe.scheduler, name)
    assert (error.value.option, error.value.given) == ("scheduler", name)
    assert name not in error.value.expected
    assert pipe.scheduler is scheduler


def test_no_name_keeps_the_scheduler_and_an_unknown_one_is_rejected() -> None:
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler())
    before = pipe.scheduler
    assert other_scheduler(before, None) is before
    with pytest.raises(OptionError):
        other_scheduler(before, "dpm")  # type: ignore[arg-type]


def test_a_name_means_the_same_for_every_base_model() -> None:
    base = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, algorithm_type="sde-dpmsolver++", beta_end=0.3)
    plain = other_scheduler(base, "dpmpp_2m").config
    assert (plain.use_karras_sigmas, plain.algorithm_type, plain.beta_end) == (False, "dpmsolver++", 0.3)
    assert other_scheduler(base, "euler").config.use_karras_sigmas is False

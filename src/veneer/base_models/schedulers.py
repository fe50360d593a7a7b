"""Schedulers (samplers) by name, for generation with another one than the base model's."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Literal, get_args

from veneer.injection.errors import OptionError

Scheduler = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "heun", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_karras",
    "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "unipc", "deis", "lcm", "flow_euler", "flow_heun",
]  # fmt: skip
"""Names as other tools write them: `dpmpp_2m_karras` is DPM++ 2M Karras."""

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
"""Name to the class of diffusers and its settings; all others are those of the base model's scheduler."""


PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "algorithm_type": "dpmsolver++"}
"""Settings that a name sets even if the base model's scheduler has others, where its class has them."""


def other_scheduler(scheduler: Any, name: Scheduler | None) -> Any:
    """A scheduler of another class with the noise schedule and prediction type of this one, and without its other settings of
    sigmas.

    Args:
        name: one of `Scheduler`; None returns the scheduler itself.
    Raises:
        OptionError: an unknown name, or a scheduler of the other kind: flow matching or noise prediction.
    """
    if name is None:
        return scheduler
    if name not in CLASSES:
        message = f"scheduler is {name!r}; expected one of {', '.join(get_args(Scheduler))}."
        raise OptionError(message, option="scheduler", given=name, expected=get_args(Scheduler))
    present = type(scheduler).__name__
    if _is_flow(present) != _is_flow(CLASSES[name][0]):
        fitting = tuple(key for key, (kind, _) in CLASSES.items() if _is_flow(kind) == _is_flow(present))
        message = f"scheduler {name!r} does not fit a base model with {present}; expected one of {', '.join(fitting)}."
        raise OptionError(message, option="scheduler", given=name, expected=fitting)
    kind, settings = CLASSES[name]
    settings = {**PLAIN, **settings}
    cls = getattr(importlib.import_module("diffusers"), kind)
    known = inspect.signature(cls.__init__).parameters
    return cls.from_config(scheduler.config, **{key: value for key, value in settings.items() if key in known})


def _is_flow(kind: str) -> bool:
    return kind.startswith("FlowMatch")

"""Configuration of the training loop, and the learning-rate schedule as a function of the step."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from veneer.base_models.devices import Dtype

from .errors import TrainError
from .optimizer_options import OptimizerOptions
from .optimizers import averages_weights, check_name, parse_arguments
from .schedule import CONSTANT, SCHEDULES, Schedule

PRECISIONS = ("no", "bf16", "fp16")
EMA_WARMUPS = ("ramp", "power")
LEAST = {"steps": 1, "batch": 1, "gradient_accumulation_steps": 1, "log_every": 1, "cycles": 1} | dict.fromkeys(
    ("warmup", "max_grad_norm", "weight_decay", "checkpoint_every", "keep_checkpoints", "preview_every", "power"), 0
)
PRESETS: Mapping[str, float] = {"quick": 1 / 3, "balanced": 1.0, "thorough": 2.0}
"""Preset to its multiple of the default number of steps."""
WITHOUT_EFFECT = ("checkpoint_every", "keep_checkpoints", "preview_every", "log_every", "tracker")
"""Fields that do not affect the trained weights; they may change on resume."""
IF_SET = {"optimizer_args": {}, "cycles": 1, "power": 1.0, "min_lr_ratio": 0.0}
"""Fields that must match on resume if they differ from these defaults."""


@dataclass(frozen=True)
class TrainConfig(OptimizerOptions):
    """Configuration of `Trainer`. A run is a pure function of it, the loss and the initial weights.

    Args:
        steps: optimizer steps of the run.
        batch: micro-batch size over all processes.
        gradient_accumulation_steps: micro-batches per optimizer step, of `batch * gradient_accumulation_steps` samples.
        learning_rate: peak learning rate, multiplied by a group's `lr_scale` and the schedule. Prodigy and D-Adaptation use 1.0
            instead.
        schedule: name in `SCHEDULES`.
        warmup: steps of linear warm-up.
        optimizer, optimizer_args, cycles, power, min_lr_ratio: see `OptimizerOptions`.
        weight_decay: decoupled weight decay (for `sgd` the L2 term).
        mixed_precision: `no` (float32), `bf16` or `fp16` autocast. Trainable tensors stay in float32.
        max_grad_norm: largest L2 norm of the whole gradient; 0 for no clipping.
        ema: EMA decay, such as 0.9999; 0 disables it.
        ema_warmup: warm-up of the decay, `ramp` or `power` (see `ema.EMA`).
        seed: random seed; all randomness is a function of it, the step and the sample.
        checkpoint_every: steps between checkpoints; 0: only when stopped.
        keep_checkpoints: number of newest checkpoints to keep; 0 keeps all.
        preview_every: steps between previews; 0 disables them.
        log_every: steps between tracker records.
        tracker: comma-separated tracker names of accelerate, or `none`.

    Raises:
        TrainError: a value out of range or an unknown name.
    """

    steps: int = 500
    batch: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    mixed_precision: str = "no"
    ema: float = 0.0
    ema_warmup: str = "ramp"
    seed: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    preview_every: int = 0
    log_every: int = 10
    tracker: str = "tensorboard"

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            self._check(name, getattr(self, name) >= least, f"at least {least}")
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "finite and above 0")
        self._check("ema", 0 <= self.ema < 1, "0, or a decay below 1")
        self._check("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "0 to 1")
        for name, allowed in (
            ("schedule", tuple(SCHEDULES)),
            ("mixed_precision", PRECISIONS),
            ("ema_warmup", EMA_WARMUPS),
        ):
            self._check(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        check_name(self.optimizer)
        averages = bool(self.ema) and averages_weights(self.optimizer)
        self._check("ema", not averages, f"0, because {self.optimizer} averages the weights itself")
        parse_arguments(self.optimizer, self.optimizer_args)

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            given = getattr(self, name)
            raise TrainError(f"{name} is {given!r}; expected {expected}", where=name, given=given, expected=expected)

    @property
    def samples(self) -> int:
        """Samples in one optimizer step, over all processes: `batch * gradient_accumulation_steps`."""
        return self.batch * self.gradient_accumulation_steps

    def rate(self, step: int) -> float:
        """Learning-rate factor of step `step` (0-based): linear warm-up, then the schedule."""
        schedule = Schedule(self.schedule, self.warmup, self.steps, self.cycles, self.power, self.min_lr_ratio)
        return schedule.factor(step)

    def identity(self) -> dict[str, Any]:
        """The fields that must match on resume. `steps` is one of them only if the schedule depends on it."""
        kept = {name: value for name, value in asdict(self).items() if name not in WITHOUT_EFFECT}
        if self.schedule in CONSTANT:
            del kept["steps"]
        return {name: value for name, value in kept.items() if name not in IF_SET or value != IF_SET[name]}


def loop_config(config: Any, **settings: Any) -> TrainConfig:
    """Configuration of the training loop of a run: the fields that the run's config shares with it, and over them `settings`.

    Args:
        config: a dataclass.
    Raises:
        TrainError: an invalid value.
    """
    names = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(config)}
    return TrainConfig(**{**{name: getattr(config, name) for name in names}, **settings})


def run_identity(config: Any, without: Collection[str]) -> dict[str, Any]:
    """Fields of a run's config that must match on resume, as JSON values: those that the loop does not have.

    Args:
        config: a dataclass. `without`: fields that may differ.
    """
    kept = {k: v for k, v in asdict(config).items() if k not in without and not hasattr(TrainConfig, k)}
    return dict(json.loads(json.dumps(kept, default=str, sort_keys=True)))


def check_dtypes(dtype: str | None, mixed_precision: str, save_dtype: str) -> None:
    """Rejects a float16 base model without loss scaling, in which gradients below 6e-8 would become 0, and unknown dtypes.

    Raises:
        TrainError: `dtype` is float16 and `mixed_precision` is not fp16, or one is unknown.
    """
    for name, value in (("dtype", dtype or "float32"), ("save_dtype", save_dtype)):
        if value not in get_args(Dtype):
            message = f"{name} is {value!r}; expected one of {', '.join(get_args(Dtype))}."
            raise TrainError(message, where=name, given=value, expected=get_args(Dtype))
    if dtype == "float16" and mixed_precision != "fp16":
        message = (
            f"dtype is float16 and mixed_precision is {mixed_precision!r}, so that small gradients would become zero; expected "
            "--mixed-precision fp16, which scales the loss, or --dtype bfloat16, which needs no scaling."
        )
        raise TrainError(message, where="dtype", given=mixed_precision, expected="fp16")


def check_sharding(shard_base: bool, quantize: Collection[str]) -> None:
    """Rejects a sharded base model with quantized weights: packed values cannot be split.

    Raises:
        TrainError: both are requested.
    """
    if shard_base and quantize:
        message = (
            f"shard_base with quantize {' '.join(quantize)}: packed weights cannot be sharded. Leave out --shard-base, or "
            "--quantize."
        )
        raise TrainError(message, where="shard_base", given=tuple(quantize), expected=())


def preset_steps(preset: str, default: int) -> int:
    """Optimizer steps of a preset, at least 10.

    Args:
        preset: name in `PRESETS`. `default`: number of steps of `balanced`.
    Raises:
        TrainError: an unknown preset.
    """
    if preset not in PRESETS:
        raise TrainError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
    return max(10, round(default * PRESETS[preset]))

"""Conditions of an attachment: images or embeddings, their strength, and the part of the schedule in which they are active.

`Conditions` holds those of one `Attachment.condition` scope, `CallConditions` those per batch row of one forward pass. Pipelines
need no further arguments: the batch is divided into prompts, images per prompt and the halves of guidance by its
size and by the guidance state that the pipeline sets while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConditionError

GUIDANCE = "_guidance_scale"  # attribute that a diffusers pipeline sets when it is called


@dataclass(frozen=True)
class CallConditions:
    """Conditions per batch row for one forward pass.

    Args:
        values: each with one row per batch row. `strength`: of this call, 0 outside of start … end.
        conditioned: (batch,), False in the half that guidance computes without conditions; None if all rows are conditioned.
        options: the method's other conditions, unchanged. `memo`: the cache of `cached`.
    """

    values: Mapping[str, Tensor]
    strength: float
    conditioned: Tensor | None
    options: Mapping[str, Any]
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def cached(self, module: nn.Module, make: Callable[[], Any]) -> Any:
        """The result of `make`, cached within the scope while autograd is off and the module's parameters are unchanged."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        versions = () if torch.is_inference_mode_enabled() else tuple(p._version for p in module.parameters())
        rows = None if self.conditioned is None else len(self.conditioned)
        key = (id(module), rows, *(len(value) for value in self.values.values()), *versions)
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def conditioned_rows(self) -> slice:
        """The conditioned rows."""
        return slice(0, None) if self.conditioned is None else slice(len(self.conditioned) // 2, None)


class Conditions:
    """Conditions of one `Attachment.condition` scope.

    Args:
        name: of the attachment, for errors.
        values: tensors (images, …), each with one row per image.
        options: the method's other conditions.
        strength: multiplies the attachment's scale. `start`, `end`: part of the schedule in which it acts, 0 to 1.
        pipeline: the pipeline that runs, or None if a bare model does, whose batches have no guidance.
    Raises:
        ConditionError: start and end are not within 0 … 1, or values have different numbers of images.
    """

    def __init__(
        self,
        name: str,
        values: Mapping[str, Tensor],
        options: Mapping[str, Any],
        strength: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        pipeline: Any = None,
    ) -> None:
        if not 0 <= start <= end <= 1:
            message = f"'{name}': start={start}, end={end}; expected 0 <= start <= end <= 1, fractions of the schedule."
            raise ConditionError(message, where=name, given=(start, end), expected=(0, 1))
        sizes = {key: len(value) for key, value in values.items()}
        if len(set(sizes.values())) > 1:
            raise ConditionError(f"'{name}': {sizes} images; expected the same number of each.", where=name, given=sizes)
        self.name, self.values, self.options = name, dict(values), dict(options)
        self.strength, self.start, self.end = strength, start, end
        self.images = next(iter(sizes.values()), 1)
        self.pipeline = pipeline
        self._memo: dict[Any, Any] = {}
        self._guidance: Any = None
        self._run: tuple[int, int] | None = None

    def open(self) -> None:
        """Clears the guidance state of an earlier run of the pipeline, so that only runs in this scope count."""
        if (pipe := self.pipeline) is not None:
            self._guidance = pipe.__dict__.pop(GUIDANCE, None)

    def close(self) -> None:
        """Undoes `open`, if the pipeline has not run since."""
        pipe = self.pipeline
        if pipe is not None and self._guidance is not None:
            pipe.__dict__.setdefault(GUIDANCE, self._guidance)
        self._memo.clear()

    def at(self, batch: int, timestep: Any, device: torch.device) -> CallConditions:
        """Conditions of a call with `batch` rows.

        Raises:
            ConditionError: the batch is not divisible by the number of images, or the position in the schedule is unknown.
        """
        guided = self._guided(batch)
        rows = self._rows(batch, guided, device)
        values = {key: value.to(device)[rows] for key, value in self.values.items()}
        conditioned = torch.arange(batch, device=device) >= batch // 2 if guided else None
        return CallConditions(values, self.strength if self._acts(timestep) else 0.0, conditioned, self.options, self._memo)

    def _guided(self, batch: int) -> bool:
        """True if the first half of the batch is the unconditional half of classifier-free guidance."""
        pipe = self.pipeline
        if pipe is None or not hasattr(type(pipe), "do_classifier_free_guidance"):
            return False
        if GUIDANCE not in pipe.__dict__:
            raise ConditionError(
                f"'{self.name}': the model is not called by the {type(pipe).__name__} that it was attached to. Pass the "
                "pipeline or model that you call: condition(…, pipeline=pipe).",
                where=self.name,
                expected=type(pipe).__name__,
            )
        return bool(pipe.do_classifier_free_guidance)

    def _rows(self, batch: int, guided: bool, device: torch.device) -> Tensor:
        """Index of the image of each batch row."""
        prompts = batch // 2 if guided else batch
        each, left = divmod(prompts, self.images)
        if left or (guided and batch % 2):
            raise ConditionError(
                f"'{self.name}': {self.images} images for {prompts} samples; the number of images must divide it.",
                where=self.name,
                given=self.images,
                expected=prompts,
            )
        rows = torch.arange(prompts, device=device) // each
        return torch.cat([rows, rows]) if guided else rows

    def _acts(self, timestep: Any) -> bool:
        if (self.start, self.end) == (0.0, 1.0):
            return True
        scheduler = getattr(self.pipeline, "scheduler", None)
        if scheduler is None:
            raise ConditionError(
                f"'{self.name}': start and end need a pipeline's schedule. Attach to the pipeline, or leave them out.",
                where=self.name,
                given=(self.start, self.end),
                expected="schedule",
            )
        step = step_index(scheduler, timestep)
        if self._run is None or step < self._run[1]:
            self._run = (step, step)  # a run begins, not necessarily at the first timestep
        self._run = (self._run[0], step)
        step, steps = step - self._run[0], len(scheduler.timesteps) - self._run[0]
        return not (step / steps < self.start or (step + 1) / steps > self.end)


def step_index(scheduler: Any, timestep: Any) -> int:
    """Index of a call in the scheduler's list of timesteps."""
    step = getattr(scheduler, "step_index", None)
    if step is None:
        found = (scheduler.timesteps == torch.as_tensor(timestep).flatten()[0].to(scheduler.timesteps)).nonzero()
        step = int(found[0]) if len(found) else 0
    return int(step)

"""Inputs of the denoiser of a pipeline, recorded while it generates, and how its prediction changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RecordedCalls:
    """Calls of a denoiser and what it predicted.

    Args:
        calls: positional and keyword arguments of each call. `predictions`: of the unchanged denoiser.
    """

    tower: nn.Module
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    predictions: tuple[Tensor, ...]

    def change(self) -> dict[str, float]:
        """Mean of ‖ε' − ε‖ / ‖ε‖ over the calls, with ε' the present prediction."""
        changes = [
            float((prediction - before).float().norm() / before.float().norm())
            for before, prediction in zip(self.predictions, self.run(), strict=True)
        ]
        return {"change": sum(changes) / len(changes)}

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """The present predictions for the recorded calls."""
        return [_prediction(self.tower(*args, **kwargs)) for args, kwargs in self.calls]


def record_calls(tower: nn.Module, generate: Any, count: int) -> RecordedCalls:
    """Calls `generate`, and keeps `count` calls of the denoiser, evenly spaced over its timesteps."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    handle = tower.register_forward_pre_hook(record, with_kwargs=True)
    try:
        generate()
    finally:
        handle.remove()
    kept = [calls[index] for index in _evenly(len(calls), count)]
    with torch.no_grad():
        predictions = [_prediction(tower(*args, **kwargs)) for args, kwargs in kept]
    return RecordedCalls(tower, tuple(kept), tuple(predictions))


def _evenly(length: int, count: int) -> Sequence[int]:
    return sorted({round((index + 0.5) * length / count - 0.5) for index in range(min(count, length))})


def _prediction(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(list(first)) if isinstance(first, list) else first

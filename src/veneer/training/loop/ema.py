"""EMA of the weights: `ema <- d * ema + (1 - d) * weights` after every step, with warm-up of the decay `d`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Exponential moving average of tensors.

    With `s` updates done before, the decay of an update is 0 for `s = 0` (the average is initialized with the weights), then

    - `ramp`: `min(decay, (1 + s) / (10 + s))`,
    - `power`: `min(decay, 1 - (1 + s / inv_gamma) ** -power)`, for long runs.

    Args:
        tensors: the trainable tensors by name; the averages are initialized as copies.
        decay: maximum decay, in [0, 1).
        warmup: `ramp` or `power`.
        inv_gamma, power: parameters of `power`; 2/3 reaches 0.999 after 31,600 steps, 3/4 after 10,000.

    Source: `EMAModel` of diffusers (`get_decay`), with its constants.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], decay: float, warmup: str = "ramp", inv_gamma: float = 1.0, power: float = 2 / 3
    ) -> None:
        self.decay, self.warmup, self.inv_gamma, self.power = decay, warmup, inv_gamma, power
        self.tensors = dict(tensors)
        self.averages = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self._swapped = False

    def decay_at(self, step: int) -> float:
        """Decay of the update after `step` earlier ones."""
        if step <= 0:
            return 0.0
        if self.warmup == "power":
            return min(self.decay, 1 - (1 + step / self.inv_gamma) ** -self.power)
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the averages; `step` is the number of earlier updates."""
        weights = [tensor.detach() for tensor in self.tensors.values()]
        averages = list(self.averages.values())
        decay = self.decay_at(step)
        if decay == 0.0:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Swaps in the averages for previews and saving, and restores the weights bitwise. Nested use has no effect."""
        if self._swapped:
            yield
            return
        weights = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self._swapped = True
        try:
            self._write(self.averages)
            yield
        finally:
            self._write(weights)
            self._swapped = False

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(values[name])

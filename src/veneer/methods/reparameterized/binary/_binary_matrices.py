"""Matrices of two values, trained by straight-through gradients and stored as bits with a mean and a standard deviation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.functional.packed_bits import pack_bits, unpack_bits
from veneer.injection.method import Adapter

LEVEL = 0.6744897501960817
"""Upper quartile of the standard normal distribution: the two levels ± of a normalized entry are equally probable."""
EPSILON = 1e-5


class BinaryMatrices(Adapter):
    """Base of adapters whose parameters `down` and `up` are quantized to one bit per entry in each forward pass.

    W_q = σ·q((W − μ) / (σ + 1e-5)) + μ with q(w) = ±0.674 by the sign of w; μ and σ are mean and standard deviation of the
    trained W. q has the gradient of the identity, and gradients flow through μ and σ.

    Attributes, for each of the two matrices:
        bits: 1 where W > μ, eight per byte. `moments`, (2,): μ and σ. The tensors of a file.
        origin, anchor, (2,): μ and σ of the file that was loaded, and those of the parameters that stand for it, else 0: the
            moments are `origin` plus the change since `anchor`, so that a loaded file computes bitwise what was saved.
    """

    unsaved: ClassVar[tuple[str, ...]] = ("down", "up")
    training_buffers: ClassVar[tuple[str, ...]] = tuple(f"{n}_{what}" for n in ("down", "up") for what in ("origin", "anchor"))

    def register_matrices(self) -> None:
        """Registers the buffers, after the parameters."""
        for name in self.unsaved:
            count = self.get_parameter(name).numel()
            self.register_buffer(f"{name}_bits", torch.zeros(-(-count // 8), dtype=torch.uint8))
            self.register_buffer(f"{name}_moments", torch.zeros(2))
            self.register_buffer(f"{name}_origin", torch.zeros(2), persistent=False)
            self.register_buffer(f"{name}_anchor", torch.zeros(2), persistent=False)

    def moments(self, name: str) -> Tensor:
        """μ and σ, (2,)."""
        weight = self.get_parameter(name)
        return self.get_buffer(f"{name}_origin") + (_mean_and_std(weight) - self.get_buffer(f"{name}_anchor"))

    def binary(self, name: str) -> Tensor:
        """W_q of one matrix, in its shape."""
        mean, std = self.moments(name).unbind()
        normal = (self.get_parameter(name) - mean) / (std + EPSILON)
        level = torch.where(normal > 0, LEVEL, -LEVEL).to(normal.dtype)
        return (level + (normal - normal.detach())) * std + mean

    @torch.no_grad()
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Writes the present bits and moments, without the parameters."""
        for name in self.unsaved:
            moments = self.moments(name)
            self.get_buffer(f"{name}_moments").copy_(moments)
            self.get_buffer(f"{name}_bits").copy_(pack_bits(self.get_parameter(name) > moments[0]))
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.unsaved:
            del destination[f"{prefix}{name}"]

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises `ValueError` for a negative standard deviation."""
        for key, tensor in tensors.items():
            if key.endswith("_moments") and not tensor.is_meta and tensor.shape == (2,) and tensor[1] < 0:
                raise ValueError(f"{key}: the standard deviation {float(tensor[1])} is negative; the file is corrupt")

    @torch.no_grad()
    def after_load(self) -> None:
        """Sets parameters with the loaded bits and moments: one value for all ones and one for all zeros."""
        for name in self.unsaved:
            weight, loaded = self.get_parameter(name), self.get_buffer(f"{name}_moments")
            ones = unpack_bits(self.get_buffer(f"{name}_bits"), weight.numel()).reshape(weight.shape)
            count, upper = weight.numel(), ones.sum().clamp(1, max(weight.numel() - 1, 1))
            lower = (count - upper).clamp(min=1)
            above, below = (((count - 1) * n / (count * m)).sqrt() * loaded[1] for n, m in ((lower, upper), (upper, lower)))
            weight.copy_(loaded[0] + torch.where(ones, above, -below))
            self.get_buffer(f"{name}_origin").copy_(loaded)
            self.get_buffer(f"{name}_anchor").copy_(_mean_and_std(weight))


def _mean_and_std(weight: Tensor) -> Tensor:
    return torch.stack([weight.mean(), weight.std(correction=min(1, weight.numel() - 1))])

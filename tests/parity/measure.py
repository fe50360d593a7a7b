"""Rows of the parity table, and the largest difference of outputs and gradients from an oracle's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Reader = Callable[[Tensor], Tensor]
Links = Sequence[tuple[Tensor, Callable[[Reader], Tensor]]]
"""Our tensors, each with a function that reads it from the oracle's tensors: their values, or their gradients.

The function may stack, split, transpose and reshape, which does to gradients what it does to values.
"""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        method: name of the method.
        compared: what was compared, and where.
        difference: largest relative difference, as of `largest_difference`.
        dtype: number format of the comparison.
        deviations: known differences from the oracle; empty for none.
    """

    method: str
    compared: str
    difference: float
    dtype: str = "float64"
    deviations: str = ""


class EmptyComparison(Exception):
    """A tensor of the oracle is all zero, so that its comparison would prove nothing. `index` counts from 0."""

    def __init__(self, index: int) -> None:
        super().__init__(
            f"pair {index}: the oracle's tensor is all zero; expected outputs and gradients of perturbed parameters."
        )
        self.index = index


def largest_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Largest max |a − b| / max |b| over pairs (ours a, the oracle's b).

    Raises:
        EmptyComparison: a b is all zero.
        ValueError: shapes differ, or there are no pairs.
    """
    worst = []
    for index, (ours, theirs) in enumerate(pairs):
        if ours.shape != theirs.shape:
            raise ValueError(f"pair {index}: {tuple(ours.shape)} and {tuple(theirs.shape)}")
        ours, theirs = ours.detach().double(), theirs.detach().double()
        if not theirs.abs().max() > 0:
            raise EmptyComparison(index)
        worst.append(((ours - theirs).abs().max() / theirs.abs().max()).item())
    return float(max(worst))


def perturb(module: nn.Module, std: float = 0.3, seed: int = 0) -> None:
    """Adds N(0, std²) to every parameter, so that none keeps its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=std)


def copy_values(links: Links) -> None:
    """Copies the oracle's values to our tensors."""
    with torch.no_grad():
        for ours, theirs in links:
            ours.copy_(theirs(lambda tensor: tensor))


def measure(ours: Callable[[], Any], theirs: Callable[[], Any], links: Links, gradients: bool = True) -> float:
    """Largest difference of outputs and of the gradients of all links, for one random linear function of the outputs.

    The oracle's values are copied to our tensors first.

    Args:
        ours, theirs: run either side; a tensor or a tuple of tensors.
        links: trained tensors, and inputs that require gradients.
        gradients: compare them as well.
    """
    copy_values(links)
    outputs = [out if isinstance(out, tuple) else (out,) for out in (ours(), theirs())]
    pairs = list(zip(*outputs, strict=True))
    if not gradients:
        return largest_difference(pairs)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs[1]]
    for side in outputs:
        torch.stack([(t * w).sum() for t, w in zip(side, weights, strict=True)]).sum().backward()
    return largest_difference(pairs + [(_gradient(tensor), read(_gradient)) for tensor, read in links])


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def randn(*shape: int, seed: int = 1) -> Tensor:
    """Normal values in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

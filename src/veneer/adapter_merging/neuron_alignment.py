"""Alignment of the neurons of bottleneck adapters by optimal transport, before their parameters are averaged (MerA)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.extras import require
from veneer.injection import Attachment

from .delta_weights import CombineError

BOTTLENECK = frozenset({"down", "down_bias", "up", "up_bias", "scale"})
"""Tensors of a bottleneck whose neurons are the rows of `down`, the entries of `down_bias` and the columns of `up`."""


def transport_plan(cost: Tensor) -> Tensor:
    """The permutation σ that minimizes Σ_i cost[i, σ_i]: optimal transport between n neurons and n others of equal mass.

    With equal masses and equal numbers, a vertex of the transport polytope is a permutation, so the assignment is exact.

    Args:
        cost: (n, n).
    Returns:
        Indices (n,) into the second neurons.
    """
    require("scipy")
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(cost.double().cpu().numpy())[1])


def squared_distances(first: Tensor, other: Tensor) -> Tensor:
    """‖a_i − b_j‖² between the rows of two matrices (n, d)."""
    return torch.cdist(first.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def align(
    reference: Mapping[str, Tensor], other: Mapping[str, Tensor], activations: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of one bottleneck with its neurons in the order of another one's; its function does not change.

    Args:
        reference, other: tensors by name, equal in shape.
        activations: (n, samples) of both, of their neurons for equal inputs (default: the distance of the rows of `down` with
            their biases).
    Raises:
        CombineError: a tensor is not one of a bottleneck; `where` is its name.
    """
    unknown = sorted(other.keys() - BOTTLENECK)
    if unknown or "down" not in other or "up" not in other:
        names = ", ".join(unknown or other)
        message = f"{names}: no bottleneck with {', '.join(sorted(BOTTLENECK))}, whose neurons are aligned. Use parameters."
        raise CombineError(message, where=(unknown or [""])[0], given=tuple(other), expected=tuple(sorted(BOTTLENECK)))
    features = activations or tuple(_incoming(each) for each in (reference, other))
    order = transport_plan(squared_distances(*features))
    aligned = {**other, "down": other["down"][order], "up": other["up"][:, order]}
    return aligned | ({"down_bias": other["down_bias"][order]} if "down_bias" in other else {})


def _incoming(tensors: Mapping[str, Tensor]) -> Tensor:
    """What each neuron reads: its row of `down`, and its bias."""
    bias = [tensors["down_bias"][:, None]] if "down_bias" in tensors else []
    return torch.cat([tensors["down"], *bias], 1)


@contextlib.contextmanager
def record_activations(attachment: Attachment) -> Iterator[dict[str, Tensor]]:
    """Records what the neurons of an attachment's bottlenecks give in the forward passes inside a `with` block.

    Returns:
        Site name to activations (n, samples), complete at the end of the block.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in attachment.parts}
    recorded: dict[str, Tensor] = {}

    def wrap(name: str, adapter: Any) -> None:
        between, dim = adapter.between, 1 if adapter.site.layout == "NCHW" else -1

        def record(z: Tensor) -> Tensor:
            active: Tensor = between(z)
            parts[name].append(active.detach().movedim(dim, 0).flatten(1))
            return active

        adapter.between = record

    adapters: dict[str, Any] = {name: adapter for name, (_, adapter) in attachment.parts.items() if hasattr(adapter, "between")}
    for name, adapter in adapters.items():
        wrap(name, adapter)
    try:
        yield recorded
    finally:
        for adapter in adapters.values():
            del adapter.between
        recorded |= {name: torch.cat(several, 1) for name, several in parts.items() if several}

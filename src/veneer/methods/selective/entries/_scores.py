"""Scores of base weights by gradients of the training loss, and the selection of the highest."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.injection.errors import EmptySelection

from ._entries import Entries


class Probed(Protocol):
    """A tensor whose entries are selected, such as that of a `SparseAdapter`.

    Attributes:
        name: among the tensors of the entries. `own`: the entries.
        probing: while True, a forward pass uses `probe`, a leaf whose gradient is that of the tensor.
    """

    name: str
    probing: bool
    probe: Tensor | None

    @property
    def own(self) -> Entries:
        """The entries of this tensor and others."""


Parts = Sequence[tuple[Any, Probed]]
LOSS_SCALE = 2.0**16
"""First scale of losses in float16, that of `torch.amp.GradScaler`."""


def accumulate_gradients(
    method: str,
    parts: Parts,
    losses: Iterable[Tensor],
    samples: int,
    term: Callable[[Tensor], Tensor],
    batch: int = 1,
) -> list[Tensor]:
    """Σ term(dL/dW) over the samples, for the weight of each adapter, in float32 or wider.

    Args:
        method: name for errors. `parts`: sites and adapters.
        losses: of single samples, see `Attachment.select`. `samples`: how many are read at most.
        term: of the mean gradient of `batch` samples.
    Raises:
        EmptySelection: there is no sample, or the gradients are all zero or not finite.
    """
    sums: list[Tensor | None] = [None] * len(parts)
    count = 0
    for gradients in _mean_gradients([adapter for _, adapter in parts], itertools.islice(losses, samples), batch):
        count += 1
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                value, before = term(gradient), sums[i]
                sums[i] = value if before is None else before.add_(value)
    if not count:
        raise _empty(method, 0, "no sample was given", "at least one sample")
    _require_scores(method, [total for total in sums if total is not None])
    return [_zeros(site, adapter) if total is None else total for (site, adapter), total in zip(parts, sums, strict=True)]


def _zeros(site: Any, adapter: Probed) -> Tensor:
    """Scores of a weight that the loss does not depend on."""
    shape = site.weight_shape if hasattr(site, "weight_shape") else site.shape
    return torch.zeros(shape, device=adapter.own.values.device)


def _mean_gradients(adapters: Sequence[Probed], losses: Iterator[Tensor], batch: int) -> Iterator[list[Tensor | None]]:
    """Mean gradients of `batch` samples each, the last of those that are left. The graph of a loss is freed before the next."""
    with _probing(adapters):
        while True:
            sums: list[Tensor | None] = [None] * len(adapters)
            count = 0
            for loss in itertools.islice(losses, batch):
                count += 1
                for i, gradient in _gradients(loss, adapters):
                    before = sums[i]
                    sums[i] = gradient if before is None else before.add_(gradient)
            if not count:
                return
            yield [None if total is None else total / count for total in sums]


def _gradients(loss: Tensor, adapters: Sequence[Probed]) -> Iterator[tuple[int, Tensor]]:
    """Number of an adapter and dL/dW of its weight, in float32 or wider, for each weight that the loss depends on."""
    probes = [(i, adapter.probe) for i, adapter in enumerate(adapters) if adapter.probe is not None]
    if not probes or not loss.requires_grad:
        return
    for (i, _), gradient in zip(probes, _unscaled_gradients(loss, [probe for _, probe in probes]), strict=True):
        if gradient is not None:
            yield i, gradient


def _unscaled_gradients(loss: Tensor, probes: Sequence[Tensor]) -> list[Tensor | None]:
    """dL/dW in float32 or wider. In float16 the loss is scaled against underflow; the scale is halved until all are finite."""
    scale = LOSS_SCALE if _is_float16(loss, probes) else 1.0
    while True:
        gradients = torch.autograd.grad(loss * scale, probes, allow_unused=True, retain_graph=scale > 1)
        if scale <= 1 or all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients):
            wide = [g if g is None or g.dtype == torch.float64 else g.float() for g in gradients]
            return [None if gradient is None else gradient / scale for gradient in wide]
        scale /= 2


def _is_float16(loss: Tensor, probes: Sequence[Tensor]) -> bool:
    """True if gradients may be computed in float16: under its autocast, or of float16 weights."""
    device = loss.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return autocast or any(probe.dtype == torch.float16 for probe in probes)


@contextlib.contextmanager
def _probing(adapters: Sequence[Probed]) -> Iterator[None]:
    try:
        for adapter in adapters:
            adapter.probing = True
        yield
    finally:
        for adapter in adapters:
            adapter.probing, adapter.probe = False, None


def select_highest(parts: Parts, scores: Sequence[Tensor]) -> None:
    """Selects, among all weights of a tower, the entries with the highest scores: as many as the entries have values."""
    towers: dict[int, tuple[Entries, list[tuple[int, Tensor]]]] = {}
    for (_, adapter), score in zip(parts, scores, strict=True):
        towers.setdefault(id(adapter.own), (adapter.own, []))[1].append((adapter.own.numbers[adapter.name], score))
    for entries, numbered in towers.values():
        flat = torch.cat([score.reshape(-1) for _, score in sorted(numbered, key=lambda pair: pair[0])])
        entries.select(flat.topk(len(entries.values), sorted=False).indices)


def _require_scores(method: str, scores: Sequence[Tensor]) -> None:
    """Raises `EmptySelection` if the scores do not distinguish any entries."""
    if not all(bool(torch.isfinite(score).all()) for score in scores):
        remedy = "finite losses: train in bfloat16 or float32, or lower the scale of the inputs"
        raise _empty(method, "not finite", "gradients of the samples are not finite", remedy)
    if not any(bool(score.any()) for score in scores):
        remedy = "a loss that depends on the selected weights: enable the adapters, and initialize the head, as --lp-ft does"
        raise _empty(method, "zero", "the gradients of all samples are zero", remedy)


def _empty(method: str, given: object, problem: str, expected: str) -> EmptySelection:
    return EmptySelection(f"{method}: {problem}; expected {expected}.", where=method, given=given, expected=expected)

"""What a training step costs: counted without computing it, or measured."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

STATES: dict[str, float] = {"adamw": 8, "adamw8bit": 2, "sgd": 4, "prodigy": 16, "adafactor": 0.5}
"""Bytes of optimiser state for each float32 value (Prodigy: two moments, s and the start; Adafactor: factored, so rough)."""


@dataclass(frozen=True)
class StepCost:
    """One forward and backward pass of one micro-batch.

    Args:
        activations: peak bytes of tensors that the pass makes, gradients included, on top of what was there before.
        flops: multiplications and additions. `seconds`: measured, or None; `forward`: the part of the forward pass, or None.
    """

    activations: int
    flops: int
    seconds: float | None = None
    forward: float | None = None


class PeakBytes(TorchDispatchMode):
    """Follows the bytes of every tensor made while it is on; `peak` is the most that lived at one time.

    Counts tensors, not an allocator's rounding or a library's workspace.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._see(tensor.untyped_storage(), before)
        return out

    def _see(self, storage: Any, before: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in before or key in self._live:
            return
        self._live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


def counted(tower: nn.Module, inputs: Mapping[str, Any], trainable: Iterable[Tensor] = ()) -> StepCost:
    """The cost of a pass through `tower` from shapes alone: nothing is computed and no memory is taken.

    Args:
        tower: with its adapters attached. `inputs`: keyword inputs of the real sizes; values do not matter, and may be on `meta`.
        trainable: what gets gradients, where it is not marked by `requires_grad`.
    """
    wanted = {id(p) for p in trainable}
    device = next(tower.parameters()).device
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(t: Tensor) -> Tensor:
        with mode:
            shape = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        return nn.Parameter(shape, t.requires_grad or id(t) in wanted) if isinstance(t, nn.Parameter) else shape

    memo: dict[int, Any] = {id(t): fake(t) for t in (*tower.parameters(), *tower.buffers())}
    twin = copy.deepcopy(tower, memo)
    given = tree_map(lambda v: fake(v) if isinstance(v, Tensor) else v, dict(inputs))
    return _under_counters(lambda: _loss(twin(**given)), mode)


def measured(step: Callable[[], Tensor]) -> StepCost:
    """The cost of a real pass: `step()` gives the loss, which is then sent backward. Runs twice; the second, warm, is timed.

    Gradients are added to as by any backward pass; zero them afterwards.
    """
    cost = _under_counters(step)
    _synchronize()
    start = time.perf_counter()
    loss = step()
    _synchronize()
    forward = time.perf_counter() - start
    loss.backward()
    _synchronize()
    return StepCost(cost.activations, cost.flops, time.perf_counter() - start, forward)


def _under_counters(step: Callable[[], Tensor], mode: Any = None) -> StepCost:
    peak, flops = PeakBytes(), FlopCounterMode(display=False)
    with torch.enable_grad(), flops:
        if mode is None:
            with peak:
                step().backward()
        else:
            with mode, peak:
                step().backward()
    return StepCost(peak.peak, flops.get_total_flops())


def _loss(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output.float().square().mean()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def flops_per_second(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """What a matrix product reaches on this device, from the best of three short runs."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        _synchronize()
        start = time.perf_counter()
        a @ a
        _synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    seen = {id(t): t.numel() * t.element_size() for t in tensors}
    return sum(seen.values())

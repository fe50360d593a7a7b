"""Cost of a training step: counted from shapes, or measured."""

from __future__ import annotations

import contextlib
import copy
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from veneer.injection.attachment.training_hooks import allow_unselected
from veneer.injection.sharded_tensor import local_bytes


class MaskValues(FakeTensorMode):
    """Fake tensors, except that masks and positions keep their values: a model may read the lengths of sequences from them."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def may_turn_const(self, t: Tensor) -> bool:
        return not t.is_floating_point() and not t.is_complex() and not t.is_meta and not isinstance(t, FakeTensor)

    def mask(self, values: Tensor) -> Tensor:
        """A fake tensor with values."""
        fake: Tensor = self.fake_tensor_converter.from_real_tensor(self, values, make_constant=True)
        return fake


@dataclass(frozen=True)
class StepCost:
    """Cost of the forward and backward pass of a micro-batch.

    Args:
        activations: peak bytes of tensors created in the pass, including gradients.
        flops: multiplications and additions, or 0 if not counted.
        seconds: measured, or None. `forward`: seconds of the forward pass, or None.
    """

    activations: int
    flops: int
    seconds: float | None = None
    forward: float | None = None


class FlopCounter(FlopCounterMode):
    """torch's counter without its module tracker, whose gradient hooks would keep recomputed activations alive."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _NoTracker()


class _NoTracker(contextlib.AbstractContextManager[None]):
    parents = ("Global",)

    def __exit__(self, *error: object) -> None:
        return None


class PeakBytes(TorchDispatchMode):
    """Dispatch mode that tracks the bytes of tensors created within it; `peak` is their maximum.

    Excludes rounding of the allocator and workspaces of libraries.
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
            self._track(tensor.untyped_storage(), before)
        return out

    def _track(self, storage: Any, before: set[int]) -> None:
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
    """Tensors in the arguments or the result of an operator; faster than torch's pytree, because it runs for every operator."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [tensor for item in tree for tensor in _tensors(item)]


def count_step_cost(
    tower: nn.Module,
    inputs: Mapping[str, Any],
    trainable: Iterable[Tensor] = (),
    dtype: torch.dtype | None = None,
    flops: bool = True,
) -> StepCost:
    """Cost of a pass through `tower` from shapes with fake tensors, without computation or memory.

    Args:
        tower: model with attached adapters, which may be on `meta` and is then counted as on a CPU.
        inputs: keyword inputs with the real shapes, which may be on `meta`.
        trainable: parameters with gradients besides those that require them.
        dtype: autocast dtype, or None. `flops`: count them too, else they are 0.
    """
    run, mode = fake_pass(tower, inputs, trainable, dtype)
    return _under_counters(lambda: _loss(run()), mode, flops)


def count_forward_bytes(tower: nn.Module, inputs: Mapping[str, Any], method: str = "forward") -> int:
    """Peak bytes that a method of `tower` allocates without gradients, from shapes; see `count_step_cost`."""
    run, mode = fake_pass(tower, inputs, method=method)
    with torch.no_grad(), mode, PeakBytes() as peak:
        run()
    return peak.peak


def fake_pass(
    tower: nn.Module,
    inputs: Mapping[str, Any],
    trainable: Iterable[Tensor] = (),
    dtype: torch.dtype | None = None,
    method: str = "forward",
) -> tuple[Callable[[], Any], FakeTensorMode]:
    """A call of a copy of `tower` with fake tensors, and the mode in which it runs."""
    extra = {id(p) for p in trainable}
    device = next(tower.parameters()).device
    if device.type == "meta":
        device = torch.device("cpu")
    mode = MaskValues()

    def fake(t: Tensor) -> Tensor:
        with mode:
            shape = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        return nn.Parameter(shape, t.requires_grad or id(t) in extra) if isinstance(t, nn.Parameter) else shape

    memo: dict[int, Any] = {id(t): fake(t) for t in (*tower.parameters(), *tower.buffers())}
    twin = copy.deepcopy(tower, memo)
    masks = {
        name: mode.mask(torch.ones_like(v, device=device) if v.is_meta else v.to(device))
        for name, v in inputs.items()
        if ("mask" in name or name == "position_ids") and isinstance(v, Tensor) and not v.is_floating_point()
    }
    fake_inputs = {**tree_map(lambda v: fake(v) if isinstance(v, Tensor) else v, dict(inputs)), **masks}
    call = twin if method == "forward" else getattr(twin, method)

    def run() -> Any:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return call(**fake_inputs)

    return run, mode


def measure_step_cost(step: Callable[[], Tensor]) -> StepCost:
    """Measures a pass: `step()` returns the loss, followed by its backward pass. Runs twice and times the second, warm pass.

    Counts no FLOPs, which are for costs from shapes. Gradients are accumulated; zero them afterwards.
    """
    cost = _under_counters(step, count_flops=False)
    _synchronize()
    start = time.perf_counter()
    with allow_unselected():
        loss = step()
    _synchronize()
    forward = time.perf_counter() - start
    loss.backward()
    _synchronize()
    return StepCost(cost.activations, 0, time.perf_counter() - start, forward)


def _under_counters(step: Callable[[], Tensor], mode: Any = None, count_flops: bool = True) -> StepCost:
    peak, flops = PeakBytes(), FlopCounter()
    with allow_unselected(), torch.enable_grad(), flops if count_flops else contextlib.nullcontext():
        if mode is None:
            with peak:
                step().backward()
        else:
            with mode, peak:
                step().backward()
    return StepCost(peak.peak, flops.get_total_flops() if count_flops else 0)


def _loss(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output.float().square().mean()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def flops_per_second(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """FLOP/s of a matrix product on this device, the best of several short runs."""
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
    """Total bytes of distinct tensors on this process."""
    seen = {id(t): local_bytes(t) for t in tensors}
    return sum(seen.values())

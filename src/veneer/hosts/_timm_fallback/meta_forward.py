"""One forward pass of a copy of a model on the meta device: which modules are called, and which parameters reach the output."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection.attachment.probe import tensors
from veneer.injection.errors import UnsupportedSite
from veneer.injection.seams.adapter_calls import base_tensor

from .._describe import own_modules, own_parameters

Size = tuple[int, int, int]


@dataclass
class MetaForward:
    """Calls and parameter uses of one forward pass. Paths are those of `own_modules`, the first of each shared module.

    Args:
        order: path -> index of the first call. `calls`: path -> number of calls.
        inputs, outputs: path -> shape of the first argument and of the output, if these are tensors.
        uses: (path, parameter) -> number of operations that read it and that the output depends on.
        owners: (path, parameter) -> number of modules that hold the parameter.
        result: shape of the model's output, or None if that is not one tensor.
    """

    order: dict[str, int] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uses: Counter[tuple[str, str]] = field(default_factory=Counter)
    owners: Counter[tuple[str, str]] = field(default_factory=Counter)
    result: tuple[int, ...] | None = None


_CACHE: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], MetaForward]] = weakref.WeakKeyDictionary()


def meta_forward(model: nn.Module, size: Size) -> MetaForward:
    """The traced forward pass of a model in evaluation mode, without its adapters; cached until its modules change.

    Args:
        size: channels, height and width of the images.
    Raises:
        UnsupportedSite: the forward pass fails on the meta device.
    """
    modules = own_modules(model)
    key = (f"{size} {model_classes(model)}", *(f"{path} {_own_class(module).__qualname__}" for path, module in modules))
    entry = _CACHE.get(model)
    if entry is None or entry[0] != key:
        entry = _CACHE[model] = key, _trace(model, size)
    return entry[1]


def _trace(model: nn.Module, size: Size) -> MetaForward:
    trace = MetaForward()
    twin = meta_copy(model)
    for path, module in unique_modules(twin).items():
        module.register_forward_pre_hook(_before(trace, path), with_kwargs=True)
        module.register_forward_hook(_after(trace, path))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            output = twin(torch.empty(2, *size, device="meta"))
    except Exception as error:  # every model has its own ways to fail
        name = type(model).__name__
        raise UnsupportedSite(
            f"host timm_fallback: the forward pass of {name} on images of {size} fails on the meta device "
            f"({type(error).__name__}: {error}), so its sites are unknown. Pass a model that accepts its configured input size.",
            host="timm_fallback",
            given=size,
        ) from error
    trace.result = tuple(output.shape) if isinstance(output, Tensor) else None
    _count_uses(trace, twin, list(tensors(output)))
    return trace


def unique_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module without adapters, each shared module once, by its first path."""
    paths: dict[int, tuple[str, nn.Module]] = {}
    for path, module in own_modules(model):
        paths.setdefault(id(module), (path, module))
    return dict(paths.values())


def model_classes(model: nn.Module) -> int:
    """Number of classes of the head; 0 without one."""
    return int(getattr(model, "num_classes", 0) or 0)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the meta device: without memory for tensors, hooks and gradient checkpointing."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        twin = torch.empty(tensor.shape, dtype=dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(twin, twin.is_floating_point()) if isinstance(tensor, nn.Parameter) else twin
    for tensor in _cached_tensors(model):
        memo.setdefault(id(tensor), torch.empty_like(tensor, device="meta", requires_grad=False))
    clone: nn.Module = copy.deepcopy(model, memo).eval()
    for module in clone.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
        if getattr(module, "grad_checkpointing", False) is True:
            module.grad_checkpointing = False  # type: ignore[assignment]
    return clone


def _cached_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors in attributes of modules, such as cached attention biases; `deepcopy` rejects those with a graph."""
    for module in model.modules():
        for value in vars(module).values():
            yield from (t for t in (value.values() if isinstance(value, dict) else (value,)) if isinstance(t, Tensor))


def _own_class(module: nn.Module) -> type:
    """The class of a module, without the one that a parametrization puts before it."""
    return type(module).__bases__[0] if "_veneer_order" in module.__dict__ else type(module)


def _before(trace: MetaForward, path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.order.setdefault(path, len(trace.order))
        trace.calls[path] += 1
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor):
            trace.inputs.setdefault(path, tuple(first.shape))

    return hook


def _after(trace: MetaForward, path: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            trace.outputs.setdefault(path, tuple(output.shape))

    return hook


def _count_uses(trace: MetaForward, twin: nn.Module, outputs: list[Tensor]) -> None:
    """Fills `uses` and `owners` from the autograd graph: one edge to a leaf for each operation that reads it."""
    edges = Counter(id(leaf) for leaf in _leaves(outputs))
    modules = unique_modules(twin)
    parameters = {(path, name): _base(module, name) for path, module in modules.items() for name in own_parameters(module)}
    holders = Counter(map(id, parameters.values()))
    for key, parameter in parameters.items():
        trace.uses[key], trace.owners[key] = edges[id(parameter)], holders[id(parameter)]


def _base(module: nn.Module, name: str) -> Tensor:
    """A direct parameter, also if it is parametrized."""
    tensor: Tensor = base_tensor(module, "", name)
    return tensor


def _leaves(outputs: list[Tensor]) -> Iterator[Tensor]:
    """The leaf tensors of a graph, once for each edge."""
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node: Any = stack.pop()
        for after, _ in node.next_functions:
            if hasattr(after, "variable"):
                yield after.variable
            elif after is not None and after not in seen:
                seen.add(after)
                stack.append(after)

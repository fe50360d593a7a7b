"""A simulated accelerator: tensors that report the device `simulated:0`, with their values computed by the CPU.

Placement errors of a GPU become errors here, without a GPU: an operator whose inputs are on two devices, a CPU generator for
random numbers on the device, a conversion to numpy. Unlike with fake tensors the values are real, so outputs and gradients can
be compared with those of the CPU, and whole training runs work. Besides, host synchronizations and the bytes on the
device are counted.

    with simulated_accelerator() as accelerator:
        model.to(DEVICE)
        model(x.to(DEVICE)).sum().backward()
    accelerator.synchronizations, accelerator.peak_bytes

Not simulated: autocast, which changes nothing here; kernels that exist for one device only; other numerics; streams.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from veneer.injection.quantized_weight import ORDINARY

from .accelerator_counts import Allocation, SimulatedAccelerator
from .records import Skip

NAME = "simulated"
DEVICE = "simulated:0"
CPU = torch.device("cpu")
TAKES_CPU_INDICES = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
"""Operators of a GPU that accept index tensors on the CPU."""
SYNCHRONIZES = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"})
"""Operators whose result the host waits for; so do copies to the CPU."""


class DeviceMismatch(RuntimeError):
    """An operator that fails on a GPU: its inputs are on two devices, or its generator is on another device."""


_active: list[SimulatedAccelerator] = []
_library: list[torch.library.Library] = []


class SimulatedTensor(Tensor):
    """A tensor on the simulated device; `on_cpu` is the tensor that it computes with."""

    on_cpu: Tensor
    allocations: list[Allocation]

    @staticmethod
    def __new__(cls, values: Tensor) -> SimulatedTensor:
        made: SimulatedTensor = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            layout=values.layout, device=torch.device(DEVICE),
        )  # fmt: skip
        made.on_cpu = values
        made.allocations = [accelerator.add(values) for accelerator in _active]
        return made

    @property
    def data(self) -> Tensor:
        """As `Tensor.data`; assigning to it replaces the values as well."""
        data: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return data

    @data.setter
    def data(self, other: Tensor) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        if isinstance(other, SimulatedTensor):
            self.on_cpu, self.allocations = other.on_cpu, other.allocations

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.on_cpu!r})"

    def data_ptr(self) -> int:
        """Address of the values."""
        return self.on_cpu.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Storage of the values."""
        return self.on_cpu.untyped_storage()

    def tolist(self) -> Any:
        """The values as Python numbers, for which the host waits."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """An error, as on a GPU, unless `force`."""
        if not force:
            raise TypeError(f"can't convert a tensor on {DEVICE} to numpy; use Tensor.cpu() first")
        return self.detach().cpu().numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = SimulatedTensor(self.on_cpu.clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> SimulatedTensor:
        return SimulatedTensor(inner["on_cpu"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with torch.inference_mode(False), torch.no_grad():  # inference tensors can be no views of others
            return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator on the CPU values, after the checks of a device; the result is on that of `device=` or of the inputs."""
    name = func._schema.name
    leaves: list[Any] = []
    plain_args, plain_kwargs = _on_cpu(args, leaves), _on_cpu(kwargs, leaves)
    inputs = [leaf for leaf in leaves if isinstance(leaf, SimulatedTensor)]
    _check(name, inputs, leaves)
    device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    onto = device.type == NAME if device else bool(inputs)
    _count(name, args, onto)
    if onto:
        plain_kwargs.pop("pin_memory", None)
    out = func(*plain_args, **plain_kwargs)
    if name == "aten::copy_":
        return args[0]
    known = {id(t.on_cpu): t for t in inputs} if func._schema.is_mutable else {}
    return _wrapped(out, known) if onto else out


def _on_cpu(value: Any, leaves: list[Any]) -> Any:
    """An argument with the CPU's tensors and device; adds its tensors, generators and devices to `leaves`.

    As `tree_map` of torch's pytree, in a fifth of its time: this runs for every operator.
    """
    if isinstance(value, (Tensor, torch.Generator, torch.device)):
        leaves.append(value)
        if isinstance(value, SimulatedTensor):
            return value.on_cpu
        return CPU if isinstance(value, torch.device) else value
    if type(value) in (tuple, list):
        return type(value)([_on_cpu(item, leaves) for item in value])
    return {key: _on_cpu(item, leaves) for key, item in value.items()} if type(value) is dict else value


def _wrapped(out: Any, known: dict[int, SimulatedTensor]) -> Any:
    """A result with tensors on the device: those of `known`, by the identity of their values, or new ones."""
    if isinstance(out, Tensor):
        return known[id(out)] if id(out) in known else SimulatedTensor(out)
    return type(out)([_wrapped(item, known) for item in out]) if type(out) in (tuple, list) else out


def _check(name: str, inputs: list[SimulatedTensor], leaves: list[Any]) -> None:
    """Raises if the operator would fail on a GPU; tensors without dimensions may be on the CPU."""
    elsewhere = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, SimulatedTensor) and x.dim()]
    if elsewhere and inputs and name != "aten::copy_" and name not in TAKES_CPU_INDICES:
        shapes = ", ".join(str(tuple(x.shape)) for x in elsewhere)
        raise DeviceMismatch(f"{name}: expected all inputs on {DEVICE}, got some on the CPU, of shape {shapes}.")
    if inputs and any(isinstance(x, torch.Generator) for x in leaves):
        raise DeviceMismatch(f"{name}: expected a generator on {DEVICE}, got one on the CPU.")


def _count(name: str, args: Any, onto: bool) -> None:
    to_host = (name in ("aten::_to_copy", "aten::to") and not onto) or (
        name == "aten::copy_" and isinstance(args[1], SimulatedTensor) and not isinstance(args[0], SimulatedTensor)
    )
    masked = name in TAKES_CPU_INDICES and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
    if to_host or masked or name in SYNCHRONIZES:
        for accelerator in _active:
            accelerator.synchronizations[name] += 1


class _Module:
    """`torch.simulated`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return bool(_active)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    def device_count(self) -> int:
        return int(bool(_active))

    def manual_seed_all(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...


def register() -> None:
    """Registers the device with torch, once in a process and before its first backward pass, which fixes the known devices.

    Raises:
        Skip: this version of torch has no devices written in Python, or another one is registered.
    """
    if _library:
        return
    from torch.utils import backend_registration

    setup: Any = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None or torch._C._get_privateuse1_backend_name() != "privateuseone":
        raise Skip("torch cannot register a simulated accelerator: it is older than 2.10, or has another custom device")

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return bool(_active)

        def has_primary_context(self, device_index: int) -> bool:
            return True

        def is_built(self) -> bool:
            return bool(_active)

    setup(NAME, backend_module=_Module(), hook=Hooks())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in ("tril_indices", "triu_indices"):
        library.impl(name, functools.partial(_create, getattr(torch.ops.aten, name)), "PrivateUse1")
    ORDINARY.add(SimulatedTensor)
    _library.append(library)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return SimulatedTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    plain = [t.on_cpu if isinstance(t, SimulatedTensor) else t for t in (target, source)]
    plain[0].copy_(plain[1])
    return target


@functools.cache
def _has_autograd() -> bool:
    x = SimulatedTensor(torch.zeros(1)).requires_grad_()
    try:
        x.sum().backward()
    except RuntimeError:
        return False
    return True


def _create(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return SimulatedTensor(func(*args, **{**kwargs, "device": torch.device("cpu")}))


def on_device(tree: Any) -> Any:
    """A tree of containers with its tensors moved to the device."""
    return tree_map_only(Tensor, lambda t: t.to(DEVICE), tree)


@contextlib.contextmanager
def simulated_accelerator() -> Iterator[SimulatedAccelerator]:
    """Makes the device available, and counts what happens on it.

    Raises:
        Skip: torch cannot register it, or the process had a backward pass before.
    """
    register()
    if not _has_autograd():
        raise Skip("call veneer.testing.simulated_accelerator.register() before the first backward pass of the process")
    accelerator = SimulatedAccelerator()
    _active.append(accelerator)
    try:
        yield accelerator
    finally:
        _active.remove(accelerator)

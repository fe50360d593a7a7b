"""Frozen base model whose blocks are sharded over the processes by FSDP2; trained parameters stay replicated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from veneer.injection.errors import HostChanged
from veneer.injection.quantized_weight import is_quantized
from veneer.injection.seams.seam import Seam
from veneer.injection.sharded_tensor import full_tensor, is_sharded, local_bytes, unsharded_class

END, GATHER = -1, -2
"""Messages of the main process beside the number of a unit that it runs: it is done, or it needs all whole weights."""


class ShardedBase:
    """Base model of which each process holds a part, gathered block by block in each forward and backward pass.

    All processes must run the same towers in the same order, because each pass gathers weights. Where the main process runs
    them alone, for previews and evaluation, the others `follow` it: they take part in every gathering and compute nothing.

    Args:
        accelerator: device and processes, at least two.
        towers: models with frozen weights. Adapters must be attached: their parameters, and base parameters that train, are
            left whole on every process, so that gradients, optimizer, checkpoints and files are those of a run that is not
            sharded.

    Attributes:
        units: the sharded modules: blocks of the towers that the libraries do not split either, and the towers themselves.
    Raises:
        HostChanged: a weight is quantized, whose packed values cannot be split.
    """

    def __init__(self, accelerator: Accelerator, towers: Sequence[nn.Module]) -> None:
        self.accelerator, self.towers = accelerator, list(towers)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.units = [unit for tower in towers for unit in _shard(tower, mesh)]
        for number, unit in enumerate(self.units):
            module: Any = unit  # its class is a subclass of its former one and of FSDPModule
            module.register_forward_pre_hook(partial(self._announce, number), prepend=True)  # before FSDP's own, which gathers
        self._leads = False

    def bytes(self) -> tuple[int, int]:
        """Bytes of the frozen weights on this process, and those of the whole towers."""
        tensors = {id(p): p for tower in self.towers for p in tower.parameters() if not p.requires_grad}
        return sum(map(local_bytes, tensors.values())), sum(p.numel() * p.element_size() for p in tensors.values())

    @contextlib.contextmanager
    def lead(self) -> Iterator[None]:
        """Context of the main process that runs the towers alone, while the others `follow`."""
        self._leads = True
        try:
            yield
        finally:
            self._leads = False
            self._send(END)

    @torch.no_grad()
    def follow(self) -> None:
        """Takes part in the gathering of weights until the main process leaves `lead`."""
        while (message := self._send(END)) != END:
            if message == GATHER:
                for _ in self._whole_weights():
                    pass
            else:
                self.units[message].unshard()
                self.units[message].reshard()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Context within `lead` in which the towers of the main process have their whole weights, on the CPU, to be read."""
        self._send(GATHER)
        sharded: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for module, name, weight in self._whole_weights():
                parameter = module._parameters[name]
                assert parameter is not None
                sharded.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for module, name, parameter in sharded:
                module._parameters[name] = parameter

    @torch.no_grad()
    def _whole_weights(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Module, name and whole weight on the CPU of every sharded parameter, in one order on all processes."""
        for tower in self.towers:
            for module in list(tower.modules()):
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None and is_sharded(parameter):
                        yield module, name, full_tensor(parameter.detach()).cpu()

    def _announce(self, number: int, module: nn.Module, args: Any) -> None:
        if self._leads:
            self._send(number)

    def _send(self, message: int) -> int:
        """Sends a message of the main process to the others; all return it."""
        tensor: Tensor = broadcast(torch.tensor(message, device=self.accelerator.device))
        return int(tensor.item())


def _shard(tower: nn.Module, mesh: Any) -> list[FSDPModule]:
    """Shards a tower and its blocks, the innermost first. Returns them."""
    _reject_quantized(tower)
    blocks = getattr(tower, "_no_split_modules", None) or ()
    inner = [module for module in tower.modules() if type(module).__name__ in blocks and module is not tower]
    ignored = set(_replicated(tower))
    units = [
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored) for module in [*inner[::-1], tower]
    ]
    for unit in units:
        _restore_class_name(unit)
    root: Any = units[-1]
    root._get_fsdp_state()._lazy_init()  # a process that follows may gather blocks before its first forward pass
    return units


def _restore_class_name(unit: FSDPModule) -> None:
    """Gives the class of a sharded module the name that it had: transformers looks up by it which outputs a model records."""
    kind, original = type(unit), unsharded_class(type(unit))
    kind.__name__, kind.__qualname__, kind.__module__ = original.__name__, original.__qualname__, original.__module__


def _replicated(tower: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters that stay whole: those of adapters, base parameters that train, and scalars, which cannot be split."""
    for module in tower.modules():
        if isinstance(module, Seam):
            yield from module.parameters()
    yield from (parameter for parameter in tower.parameters() if parameter.requires_grad or parameter.ndim == 0)


def _reject_quantized(tower: nn.Module) -> None:
    for name, parameter in tower.named_parameters():
        if is_quantized(parameter):
            message = f"'{name}' is quantized, and packed weights cannot be sharded. Leave out the quantization or --shard-base."
            raise HostChanged(message, where=name, given=type(parameter).__name__, expected="float weights")

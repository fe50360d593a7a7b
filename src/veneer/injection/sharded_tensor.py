"""Sharded tensors: torch's DTensor, as which `fully_shard` and tensor parallelism hold the parameters of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

WRAPPERS = ("FSDPModule", "FullyShardedDataParallel")
"""Names of the classes by which a sharded module is recognized."""


def is_sharded(tensor: Any) -> bool:
    """True for a tensor of which each process holds a part; recognized by name, so that torch.distributed is not imported."""
    return type(tensor).__name__ == "DTensor"


def sharded_modules(tower: nn.Module) -> set[nn.Module]:
    """Modules that were sharded themselves, or that hold a sharded parameter."""
    modules = list(tower.modules())
    classes = {kind for kind in {type(module) for module in modules} if is_sharded_class(kind)}
    return {m for m in modules if type(m) in classes or any(is_sharded(p) for p in m._parameters.values())}


def is_sharded_class(kind: type) -> bool:
    """True for the class of a module that was sharded."""
    return any(base.__name__ in WRAPPERS for base in kind.__mro__)


def unsharded_class(kind: type) -> type:
    """The class of a module before `fully_shard`, which replaces it by a subclass."""
    return next((base for base in kind.__mro__ if not is_sharded_class(base)), kind) if is_sharded_class(kind) else kind


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. Every process must call it for a sharded one, because it gathers the parts."""
    gather: Any = getattr(tensor, "full_tensor", None)
    whole: Tensor = gather() if is_sharded(tensor) else tensor
    return whole


def local_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor on this process."""
    part: Any = tensor
    local: Tensor = part.to_local() if is_sharded(tensor) else tensor
    return local.numel() * local.element_size()


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor into another one, which may be sharded; every process must call it then."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        part: Any = target
        source = distribute_tensor(source.to(target.device, target.dtype), part.device_mesh, part.placements)
    target.copy_(source)

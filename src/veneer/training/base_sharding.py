"""Base model of a training command: loaded onto the device of each process, or sharded over the processes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from veneer.base_models.devices import Dtype
from veneer.base_models.loading import load_on_device

from .data.latent_cache import why_not_cached
from .preflight.estimates import size

if TYPE_CHECKING:
    from .families import Family
    from .loop.sharded_base import ShardedBase


class BaseOptions(Protocol):
    """Options of the commands that train on a base model."""

    @property
    def base(self) -> str: ...
    @property
    def dtype(self) -> Dtype | None: ...
    @property
    def quantize(self) -> Sequence[str]: ...
    @property
    def shard_base(self) -> bool: ...
    @property
    def cache(self) -> bool: ...


def is_sharding(options: BaseOptions, accelerator: Accelerator) -> bool:
    """True if the base model will be sharded: with one process, `shard_base` has no effect."""
    return options.shard_base and accelerator.num_processes > 1


def load_base(options: BaseOptions, accelerator: Accelerator) -> Any:
    """The pipeline on the device of this process; on the CPU if it will be sharded, from which its parts are moved."""
    on_cpu = is_sharding(options, accelerator)
    return load_on_device(options.base, accelerator.device, options.dtype, options.quantize, on_cpu=on_cpu)


def shard_base(options: BaseOptions, kind: Family, accelerator: Accelerator) -> ShardedBase | None:
    """Shards the denoiser, and the text encoders if they run in every step, and moves the rest of the pipeline to the device.

    Text encoders run in every step if they train or if nothing is cached. Otherwise each process needs them at other times, for
    captions that are not in its cache, and they stay whole. Adapters must be attached before.

    Returns:
        The sharded base model; None if `shard_base` is not set, or with one process.
    """
    if not is_sharding(options, accelerator):
        return None
    from .loop.sharded_base import ShardedBase

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # no family writes to a block's output in place
    texts = [*kind.text_towers.values()]
    text_runs = not options.cache or any(why_not_cached(tower) is not None for tower in texts)
    base = ShardedBase(accelerator, [kind.tower, *(texts if text_runs else ())])
    kind.pipe.to(accelerator.device)
    return base


def sharding_note(options: BaseOptions, base: ShardedBase | None) -> str:
    """What `shard_base` did, for a terminal: the bytes on each process, or that there is one process; "" without the option.

    All processes must call it.
    """
    if not options.shard_base:
        return ""
    if base is None:
        return "note: --shard-base has no effect with one process; start several with accelerate launch"
    own, whole = base.bytes()
    parts: Tensor = base.accelerator.gather(torch.tensor([own], device=base.accelerator.device))
    listed = ", ".join(size(int(part)) for part in parts.tolist())
    return f"base model: {size(whole)} of frozen weights, sharded over {len(parts)} processes: {listed}"

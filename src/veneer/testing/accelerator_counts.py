"""Counts of what happens on a simulated accelerator: host synchronizations, and bytes of its tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor


class Allocation:
    """Counts a tensor on the device as long as it lives; `torch.utils.swap_tensors` permits no weak references to the tensor.

    Args:
        accelerator: the device. `storage`: identity of the tensor's storage. `size`: bytes of it.
    """

    __slots__ = ("accelerator", "size", "storage")

    def __init__(self, accelerator: SimulatedAccelerator, storage: int, size: int) -> None:
        self.accelerator, self.storage, self.size = accelerator, storage, size

    def __del__(self) -> None:
        self.accelerator.remove(self.storage, self.size)


@dataclass
class SimulatedAccelerator:
    """What happened on the device.

    Attributes:
        synchronizations: number of times that the host waited for the device, by operator.
        bytes, peak_bytes: of the tensors on the device, now and at most.
    """

    synchronizations: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    peak_bytes: int = 0
    _tensors: Counter[int] = field(default_factory=Counter, repr=False)

    def add(self, values: Tensor) -> Allocation:
        """Counts a new tensor, until the result is deleted; views of one storage count once."""
        storage = values.untyped_storage()
        identity, size = storage._cdata, storage.nbytes()
        self._tensors[identity] += 1
        if self._tensors[identity] == 1:
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return Allocation(self, identity, size)

    def remove(self, storage: int, size: int) -> None:
        """Counts a tensor no longer; called by its allocation."""
        self._tensors[storage] -= 1
        if not self._tensors[storage]:
            del self._tensors[storage]
            self.bytes -= size

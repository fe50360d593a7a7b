"""Counts of what happens on a simulated accelerator: host synchronizations, and bytes of its tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor


class Allocation:
    """Lives as long as a tensor on the device; `torch.utils.swap_tensors` permits no weak references to the tensor itself."""


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
        storage, allocation = values.untyped_storage(), Allocation()
        self._tensors[storage._cdata] += 1
        if self._tensors[storage._cdata] == 1:
            self.bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(allocation, self._remove, storage._cdata, storage.nbytes()).atexit = False
        return allocation

    def _remove(self, storage: int, size: int) -> None:
        self._tensors[storage] -= 1
        if not self._tensors[storage]:
            del self._tensors[storage]
            self.bytes -= size

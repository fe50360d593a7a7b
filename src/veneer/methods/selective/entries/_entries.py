"""Selected entries of base weights: their indices, their updates, and the adapter that adds them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.sites import ParamSite, WeightSite


class Entries(nn.Module):
    """Selected entries of one or several tensors, which are counted through as one vector.

    Their number is fixed, so that optimizers, checkpoints and files know all shapes before the data is read. Before `select` the
    entries are spaced evenly.

    Args:
        sizes: number of elements of each tensor. `count`: number of entries, at most their sum.
        names: of the tensors.

    Attributes:
        values: (count,), added to the entries; initialized to zero.
        indices: (count,) in ascending order. `selected`: (), True after `select`.
    """

    indices: Tensor
    selected: Tensor

    def __init__(self, sizes: Sequence[int], count: int, names: Sequence[str] = ("",)) -> None:
        super().__init__()
        self.numbers = {name: number for number, name in enumerate(names)}
        self.starts = (0, *itertools.accumulate(sizes))
        total = self.starts[-1]
        even = (torch.arange(count) * total).div(count, rounding_mode="floor")
        self.values = nn.Parameter(torch.zeros(count))
        self.register_buffer("indices", even.to(torch.int32 if total < 2**31 else torch.int64))
        self.register_buffer("selected", torch.zeros((), dtype=torch.bool))
        self._bounds = tuple(-(-start * count // total) for start in self.starts)
        self._known = self._current()

    @property
    def is_selected(self) -> bool:
        """True after `select`, and for tensors without values."""
        return _has_no_values(self.selected) or bool(self.selected)

    @torch.no_grad()
    def select(self, indices: Tensor) -> None:
        """Trains these entries. `indices`: (count,), distinct, in any order."""
        self.indices.copy_(indices.sort().values)
        self.selected.fill_(True)
        self.refresh()

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        """Indices within a tensor, and their values."""
        number = self.numbers[name]
        if not torch.compiler.is_compiling() and self._known != self._current():
            self.refresh()
        first, last = self._bounds[number], self._bounds[number + 1]
        return self.indices[first:last].long() - self.starts[number], self.values[first:last]

    def refresh(self) -> None:
        """Reads the number of entries of each tensor from `indices`; after these were changed from outside."""
        if not _has_no_values(self.indices):
            starts = torch.tensor(self.starts, dtype=self.indices.dtype, device=self.indices.device)
            self._bounds = tuple(torch.searchsorted(self.indices, starts).tolist())
        self._known = self._current()

    def _current(self) -> tuple[int, int]:
        """Identifies the present content of `indices`."""
        return id(self.indices), 0 if self.indices.is_inference() else self.indices._version

    def check(self, indices: Tensor) -> None:
        """Checks the indices of a file.

        Raises:
            OptionError: they are not ascending, or out of range.
        """
        total = self.starts[-1]
        if _has_no_values(indices) or not len(indices):
            return
        if bool((indices[1:] <= indices[:-1]).any()) or int(indices[0]) < 0 or int(indices[-1]) >= total:
            given = int(indices.min()), int(indices.max())
            message = f"the indices of the file are {given[0]} to {given[1]}; expected ascending ones from 0 to {total - 1}"
            raise OptionError(message, option="indices", given=given, expected=(0, total - 1))


class EntriesAdapter(Adapter):
    """Base of adapters with values at selected entries."""

    @property
    def own(self) -> Entries:
        """The entries: those of this adapter, or those that all adapters of the tower share."""
        children: Any = self._modules
        found: Entries = children["entries"] if "entries" in children else children["shared"]
        return found

    @property
    def is_selected(self) -> bool:
        """True after `Entries.select`."""
        return self.own.is_selected

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Checks the indices of a file."""
        for key, tensor in tensors.items():
            if key.rpartition(".")[2] == "indices":
                self.own.check(tensor)

    def after_load(self) -> None:
        """Reads the number of entries of each tensor."""
        self.own.refresh()


class SparseAdapter(EntriesAdapter):
    """W' = W + ΔW, where ΔW has values at the selected entries and is zero elsewhere.

    Attributes:
        name: of its tensor among those of the entries.
        probing: while True, `probe` is added in place of the values: zeros of W's shape that collect dL/dW'.
    """

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True

    def __init__(self, name: str = "", entries: Entries | None = None) -> None:
        super().__init__()
        self.name, self.probing = name, False
        self.probe: Tensor | None = None
        if entries is not None:
            self.entries = entries

    def weight(self, weight: Tensor) -> Tensor:
        """W with the sums at the selected entries, rounded once to W's dtype."""
        if self.probing:
            if self.probe is None:
                self.probe = torch.zeros_like(weight).requires_grad_()
            return weight + self.probe
        indices, values = self.own.part(self.name)
        flat = weight.reshape(-1)
        sums = flat[indices] + values * self.strength
        return flat.index_copy(0, indices, sums.to(flat.dtype)).reshape(weight.shape)


def count_entries(sizes: Sequence[int], ratio: float) -> int:
    """Number of trained entries of tensors with these sizes: the ratio of all, at least 1."""
    return max(1, math.floor(ratio * sum(sizes)))


def describe(adapters: Iterable[Adapter]) -> str:
    """The number of selected entries."""
    found = {id(adapter.own): adapter.own for adapter in adapters if isinstance(adapter, SparseAdapter)}
    count, total = (sum(numbers) for numbers in zip(*((len(e.values), e.starts[-1]) for e in found.values()), strict=True))
    state = "selected" if all(entries.is_selected for entries in found.values()) else "to be selected"
    return f"{count:,} of {total:,} entries {state}"


def size_of(site: WeightSite | ParamSite) -> int:
    """Number of elements of the tensor of a site."""
    return math.prod(site.weight_shape if isinstance(site, WeightSite) else site.shape)


def _has_no_values(tensor: Tensor) -> bool:
    """True for tensors that have a shape only."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)

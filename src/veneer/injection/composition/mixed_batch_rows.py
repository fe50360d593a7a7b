"""Routing of batch rows to adapters in a mixed batch: each adapter runs on the rows of its samples only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapter_forms import BatchedAdapter
from ..errors import StateError, UnsupportedSite
from ..seams.adapter_calls import cast

if TYPE_CHECKING:
    from ..seams.call_seam import CallSeam

Strengths = Mapping[str, float]  # attachment to strength; attachments without an entry are disabled


class Batch:
    """Attachments and strengths of each sample in the batch of one tower.

    A forward pass has m·B rows for B samples: sample i has the rows i, i + B, …, as guidance stacks its halves. A text encoder
    may have fewer: B / k prompts for k images each, in order.

    Args:
        tower: its name, for errors. `text`: True for a text encoder.
        samples: per sample, the attachments of this tower and their strengths.

    Attributes:
        rows: number of rows of the current forward pass. `current`: strengths of the rows that an adapter processes at present.
    """

    def __init__(self, tower: str, text: bool, samples: Sequence[Strengths]) -> None:
        self.tower, self.text, self.samples = tower, text, tuple(samples)
        self.rows: int | None = None
        self.current: Strengths | None = None
        self.groups: list[tuple[Strengths, list[int]]] = []

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called before each forward pass of the tower: finds the number of rows.

        Raises:
            StateError: it is not a multiple of the number of samples.
        """
        rows = next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 1), None)
        if rows is None or rows == self.rows:
            return
        self.groups = self._grouped(self._prompts(rows))
        self.rows = rows

    def _prompts(self, rows: int) -> tuple[Strengths, ...]:
        """Strengths of each sample of a forward pass, or of each prompt if several samples share one."""
        several, left = divmod(len(self.samples), rows)
        if rows % len(self.samples) == 0:
            return self.samples
        if not self.text or left:
            raise StateError(
                f"mixed: {self.tower} received a batch of {rows}, not a multiple of the {len(self.samples)} samples. Name "
                "one per image of the batch; copies for guidance are added automatically.",
                where=self.tower,
                given=rows,
                expected=len(self.samples),
            )
        each = [self.samples[i * several : (i + 1) * several] for i in range(rows)]
        if any(sample != shared[0] for shared in each for sample in shared):
            raise StateError(
                f"mixed: {self.tower} has {rows} prompts for {len(self.samples)} samples, and samples of one prompt have "
                "different adapters there. Pass one prompt per sample.",
                where=self.tower,
                given=rows,
                expected=len(self.samples),
            )
        return tuple(shared[0] for shared in each)

    @staticmethod
    def _grouped(samples: Sequence[Strengths]) -> list[tuple[Strengths, list[int]]]:
        """Groups of samples with equal strengths."""
        groups: list[tuple[Strengths, list[int]]] = []
        for i, sample in enumerate(samples):
            known = next((numbers for strengths, numbers in groups if strengths == sample), None)
            if known is None:
                groups.append((sample, [i]))
            else:
                known.append(i)
        return groups


class SharedPort:
    """The call seams of several attachments at one port of the host. The first of them runs all.

    Args:
        seams: attachment to seam, in the order of their hooks.
    """

    def __init__(self, batch: Batch, seams: Mapping[str, CallSeam]) -> None:
        self.batch, self.seams = batch, dict(seams)
        self.leader = next(iter(self.seams.values()))
        self.one_port = self.leader.read == self.leader.write  # then each reads the output of those before it
        first = self.leader.adapters[0]
        alike = all(len(s.adapters) == 1 and s.is_whole and type(s.adapters[0]) is type(first) for s in self.seams.values())
        batched = not self.one_port and alike and isinstance(first, BatchedAdapter)
        self.batched_output: Any = first.batched_output if batched else None

    def run(self, x: Tensor, y: Tensor, fresh: bool = False) -> Tensor:
        """Applies each sample's adapters; rows of samples without adapters do not change. `fresh`: y may be overwritten."""
        self._check(x, y)
        found = None if self.batched_output is None else self._at_once(x, y, fresh)
        return self._in_parts(x, y) if found is None else found

    def _at_once(self, x: Tensor, y: Tensor, fresh: bool) -> Tensor | None:
        """Applies the first adapters of all samples at once, then the second ones; None if the adapters do not support it."""
        acting: list[list[tuple[Any, float]]] = [[] for _, numbers in self.batch.groups for _ in numbers]
        for strengths, numbers in self.batch.groups:
            for i in numbers:
                acting[i] = [
                    (s.adapters[0], strengths[n]) for n, s in self.seams.items() if n in strengths and not s.is_disabled()
                ]
        total, dtype, turns = y, y.dtype, max(len(each) for each in acting)
        for turn in range(turns):
            every = [each[turn] if turn < len(each) else None for each in acting]
            one = next(each[0] for each in every if each is not None)
            after = self.batched_output(every, cast(x, one), total, fresh if turns == 1 else turn > 0)  # y is needed by _in_parts
            if after is None:
                return None
            total = after.to(dtype)
        return total

    def _in_parts(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies the adapters of each group of samples separately and concatenates the results."""
        batch, samples = self.batch, sum(len(numbers) for _, numbers in self.batch.groups)
        pieces, order = [], []
        for index, (strengths, numbers) in enumerate(batch.groups):
            order += numbers
            pieces.append(self._group(index, strengths, _rows(x, samples, numbers), _rows(y, samples, numbers)))
        found = torch.cat([piece.unflatten(0, (-1, len(n))) for piece, (_, n) in zip(pieces, batch.groups, strict=True)], 1)
        if order != list(range(samples)):
            found = found.index_select(1, torch.tensor([order.index(i) for i in range(samples)], device=y.device))
        return found.flatten(0, 1)

    def _group(self, index: int, strengths: Strengths, x: Tensor, y: Tensor) -> Tensor:
        self.batch.current = strengths
        for name, seam in self.seams.items():
            strength = strengths.get(name, 0.0)
            if strength and not seam.is_disabled():
                adapter: Any
                for adapter in seam.adapters:
                    adapter.group = index
                after = seam.apply_slices(y if self.one_port else x, y)
                y = after if strength == 1 else torch.lerp(y, after, strength)
        self.batch.current = None
        return y

    def _check(self, x: Tensor, y: Tensor) -> None:
        site = self.leader.sites[0].name
        if self.batch.rows is None:
            message = f"mixed: {site} ran outside a forward pass of its model. Call the model, which assigns rows to samples."
            raise StateError(message, where=site, given="no forward pass of the model")
        if {len(x), len(y)} != {self.batch.rows}:
            raise UnsupportedSite(
                f"mixed: {site} has input {tuple(x.shape)} and output {tuple(y.shape)}; the batch has {self.batch.rows} rows, "
                "so rows cannot be assigned to samples. Exclude the site, or run the samples one by one.",
                site=site,
                given=(tuple(x.shape), tuple(y.shape)),
                expected=self.batch.rows,
            )

    def share(self, seam: CallSeam) -> float:
        """Strength of one of the seams in the rows that are processed at present."""
        current = self.batch.current
        if current is None:
            return 1.0
        return next(current.get(name, 0.0) for name, other in self.seams.items() if other is seam)


def _rows(tensor: Tensor, samples: int, numbers: Sequence[int]) -> Tensor:
    """Rows of these samples, of all copies: (copies · samples, …)."""
    copies = tensor.unflatten(0, (-1, samples))
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return copies.narrow(1, numbers[0], len(numbers)).flatten(0, 1)
    return copies.index_select(1, torch.tensor(numbers, device=tensor.device)).flatten(0, 1)

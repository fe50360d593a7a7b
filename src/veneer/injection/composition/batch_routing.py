"""Rows of a batch to adapters: each runs on the rows of its own samples only, so that all together do the work of one."""

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

Strengths = Mapping[str, float]  # attachment to strength; one that is not there does not act


class Batch:
    """What acts on the samples of one tower's batch.

    A pass has m·B rows for B samples: sample i is in the rows i, i + B, …, as guidance stacks its halves. A text encoder
    may have fewer, B / k prompts for k pictures each, one after the other.

    Args:
        tower: its name, for errors. `text`: True for a text encoder.
        samples: of each sample, what acts on it; of attachments of this tower.

    Attributes:
        rows: of the pass that runs. `current`: what acts on the rows that an adapter is given, while it runs.
    """

    def __init__(self, tower: str, text: bool, samples: Sequence[Strengths]) -> None:
        self.tower, self.text, self.samples = tower, text, tuple(samples)
        self.rows: int | None = None
        self.current: Strengths | None = None
        self.groups: list[tuple[Strengths, list[int]]] = []

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called at the tower's door: how many rows this pass has.

        Raises:
            StateError: they are no multiple of the samples.
        """
        rows = next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 1), None)
        if rows is None or rows == self.rows:
            return
        self.groups = self._grouped(self._prompts(rows))
        self.rows = rows

    def _prompts(self, rows: int) -> tuple[Strengths, ...]:
        """What acts on each sample of a pass, or on each prompt where several samples share one."""
        several, left = divmod(len(self.samples), rows)
        if rows % len(self.samples) == 0:
            return self.samples
        if not self.text or left:
            raise StateError(
                f"mixed: a batch of {rows} came to {self.tower}, which is no multiple of the {len(self.samples)} samples. Name "
                "one for each picture of the batch; copies for guidance come by themselves.",
                where=self.tower,
                given=rows,
                expected=len(self.samples),
            )
        each = [self.samples[i * several : (i + 1) * several] for i in range(rows)]
        if any(sample != shared[0] for shared in each for sample in shared):
            raise StateError(
                f"mixed: {self.tower} has {rows} prompts for {len(self.samples)} samples, and samples of one prompt have other "
                "adapters there. Give each sample a prompt of its own.",
                where=self.tower,
                given=rows,
                expected=len(self.samples),
            )
        return tuple(shared[0] for shared in each)

    @staticmethod
    def _grouped(samples: Sequence[Strengths]) -> list[tuple[Strengths, list[int]]]:
        """Samples on which the same acts, together."""
        groups: list[tuple[Strengths, list[int]]] = []
        for i, sample in enumerate(samples):
            known = next((numbers for strengths, numbers in groups if strengths == sample), None)
            if known is None:
                groups.append((sample, [i]))
            else:
                known.append(i)
        return groups


class Place:
    """The call seams of several attachments at one place of the host. The first of them acts for all.

    Args:
        seams: attachment to seam, in the order of their hooks.
    """

    def __init__(self, batch: Batch, seams: Mapping[str, CallSeam]) -> None:
        self.batch, self.seams = batch, dict(seams)
        self.leader = next(iter(self.seams.values()))
        self.one_port = self.leader.read == self.leader.write  # then each reads what those before it wrote
        first = self.leader.adapters[0]
        alike = all(len(s.adapters) == 1 and s.is_whole and type(s.adapters[0]) is type(first) for s in self.seams.values())
        batched = not self.one_port and alike and isinstance(first, BatchedAdapter)
        self.batched_output: Any = first.batched_output if batched else None

    def run(self, x: Tensor, y: Tensor, fresh: bool = False) -> Tensor:
        """Every sample through its own adapters; the others' rows as they are. `fresh`: y may be written over."""
        self._check(x, y)
        found = None if self.batched_output is None else self._at_once(x, y, fresh)
        return self._in_parts(x, y) if found is None else found

    def _at_once(self, x: Tensor, y: Tensor, fresh: bool) -> Tensor | None:
        """The first adapters of all samples together, then the second ones; None if the adapters cannot."""
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
            after = self.batched_output(every, cast(x, one), total, fresh if turns == 1 else turn > 0)  # y stays for the parts
            if after is None:
                return None
            total = after.to(dtype)
        return total

    def _in_parts(self, x: Tensor, y: Tensor) -> Tensor:
        """Every group of samples by itself, put together again."""
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
            message = f"mixed: {site} was run by itself. Run its whole model, whose batch says which rows are whose."
            raise StateError(message, where=site, given="run by itself")
        if {len(x), len(y)} != {self.batch.rows}:
            raise UnsupportedSite(
                f"mixed: {site} reads {tuple(x.shape)} and gives {tuple(y.shape)}, and the batch has {self.batch.rows} rows: its "
                "rows belong to no single sample. Leave the site out, or run the samples one after the other.",
                site=site,
                given=(tuple(x.shape), tuple(y.shape)),
                expected=self.batch.rows,
            )

    def share(self, seam: CallSeam) -> float:
        """The strength of one of the seams in the rows that are run now."""
        current = self.batch.current
        if current is None:
            return 1.0
        return next(current.get(name, 0.0) for name, other in self.seams.items() if other is seam)


def _rows(tensor: Tensor, samples: int, numbers: Sequence[int]) -> Tensor:
    """Rows of these samples, every copy: (copies·numbers, …)."""
    copies = tensor.unflatten(0, (-1, samples))
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return copies.narrow(1, numbers[0], len(numbers)).flatten(0, 1)
    return copies.index_select(1, torch.tensor(numbers, device=tensor.device)).flatten(0, 1)

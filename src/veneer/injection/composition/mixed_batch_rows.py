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

    A forward pass has m·B rows for B samples: sample i has the rows i, i + B, …, as with classifier-free guidance. A text encoder
    may have B / k rows: one prompt for k images each, in order.

    Args:
        tower: its name, for errors. `text`: True for a text encoder.
        samples: per sample, the attachments of this tower and their strengths.

    Attributes:
        rows: number of rows of the current forward pass. `current`: strengths of the rows that are currently processed.
        groups: strengths and the indices of the samples that have them.
    """

    def __init__(self, tower: str, text: bool, samples: Sequence[Strengths]) -> None:
        self.tower, self.text, self.samples = tower, text, tuple(samples)
        self.rows: int | None = None
        self.current: Strengths | None = None
        self.groups: list[tuple[Strengths, list[int]]] = []

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called before each forward pass of the tower: reads the number of rows from the arguments.

        Raises:
            StateError: the number of rows is not a multiple of the number of samples.
        """
        rows = next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 1), None)
        if rows is None or rows == self.rows:
            return
        self.groups = self._group_samples(self._strengths_by_row(rows))
        self.rows = rows

    def _strengths_by_row(self, rows: int) -> tuple[Strengths, ...]:
        """Strengths of each sample of a forward pass, or of each prompt if several samples share one."""
        per_prompt, remainder = divmod(len(self.samples), rows)
        if rows % len(self.samples) == 0:
            return self.samples
        if not self.text or remainder:
            raise StateError(
                f"mixed: {self.tower} received a batch of {rows}, not a multiple of the {len(self.samples)} samples. Pass one "
                "sample per image; the rows of classifier-free guidance are assigned automatically.",
                where=self.tower,
                given=rows,
                expected=len(self.samples),
            )
        by_prompt = [self.samples[i * per_prompt : (i + 1) * per_prompt] for i in range(rows)]
        if any(sample != samples[0] for samples in by_prompt for sample in samples):
            raise StateError(
                f"mixed: {self.tower} has {rows} prompts for {len(self.samples)} samples, and samples with the same prompt have "
                "different adapters in it. Pass one prompt per sample.",
                where=self.tower,
                given=rows,
                expected=len(self.samples),
            )
        return tuple(samples[0] for samples in by_prompt)

    @staticmethod
    def _group_samples(samples: Sequence[Strengths]) -> list[tuple[Strengths, list[int]]]:
        """Groups of samples with equal strengths: these strengths and the indices of the samples."""
        groups: list[tuple[Strengths, list[int]]] = []
        for i, sample in enumerate(samples):
            same = next((indices for strengths, indices in groups if strengths == sample), None)
            if same is None:
                groups.append((sample, [i]))
            else:
                same.append(i)
        return groups


class SharedPort:
    """The call seams of several attachments at one port of the host. The first one, `leader`, applies the adapters of all.

    Args:
        seams: attachment to seam, in the order of their hooks.
    """

    def __init__(self, batch: Batch, seams: Mapping[str, CallSeam]) -> None:
        self.batch, self.seams = batch, dict(seams)
        self.leader = next(iter(self.seams.values()))
        self.one_port = self.leader.read == self.leader.write  # then each adapter reads the output of the previous one
        first = self.leader.adapters[0]
        same_type = all(len(s.adapters) == 1 and s.is_whole and type(s.adapters[0]) is type(first) for s in self.seams.values())
        batched = not self.one_port and same_type and isinstance(first, BatchedAdapter)
        self.batched_output: Any = first.batched_output if batched else None

    def run(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """Applies each sample's adapters; rows of samples without adapters do not change. `overwrite`: y may be modified."""
        self._check_rows(x, y)
        output = None if self.batched_output is None else self._run_batched(x, y, overwrite)
        return self._run_by_group(x, y) if output is None else output

    def _run_batched(self, x: Tensor, y: Tensor, overwrite: bool) -> Tensor | None:
        """Applies the first adapters of all samples in one step, then the second ones; None if the adapters cannot do this."""
        by_sample: list[list[tuple[Any, float]]] = [[] for _, indices in self.batch.groups for _ in indices]
        for strengths, indices in self.batch.groups:
            for i in indices:
                by_sample[i] = [
                    (s.adapters[0], strengths[n]) for n, s in self.seams.items() if n in strengths and not s.is_disabled()
                ]
        output, dtype, steps = y, y.dtype, max(len(adapters) for adapters in by_sample)
        for step in range(steps):
            current = [adapters[step] if step < len(adapters) else None for adapters in by_sample]
            first = next(part[0] for part in current if part is not None)
            may_overwrite = overwrite if steps == 1 else step > 0  # y itself is needed by `_run_by_group` after a None
            after = self.batched_output(current, cast(x, first), output, may_overwrite)
            if after is None:
                return None
            output = after.to(dtype)
        return output

    def _run_by_group(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies the adapters of each group of samples separately and concatenates the results."""
        batch, samples = self.batch, sum(len(indices) for _, indices in self.batch.groups)
        pieces, order = [], []
        for index, (strengths, indices) in enumerate(batch.groups):
            order += indices
            pieces.append(self._run_group(index, strengths, _select_rows(x, samples, indices), _select_rows(y, samples, indices)))
        output = torch.cat([piece.unflatten(0, (-1, len(n))) for piece, (_, n) in zip(pieces, batch.groups, strict=True)], 1)
        if order != list(range(samples)):
            output = output.index_select(1, torch.tensor([order.index(i) for i in range(samples)], device=y.device))
        return output.flatten(0, 1)

    def _run_group(self, index: int, strengths: Strengths, x: Tensor, y: Tensor) -> Tensor:
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

    def _check_rows(self, x: Tensor, y: Tensor) -> None:
        """Raises an error if the rows of x and y cannot be assigned to samples."""
        site = self.leader.sites[0].name
        if self.batch.rows is None:
            message = (
                f"mixed: {site} ran outside a forward pass of its model. Call the model, so that rows can be assigned to samples."
            )
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
        """Strength of a seam in the rows that are currently processed."""
        current = self.batch.current
        if current is None:
            return 1.0
        return next(current.get(name, 0.0) for name, other in self.seams.items() if other is seam)


def _select_rows(tensor: Tensor, samples: int, indices: Sequence[int]) -> Tensor:
    """All rows of the samples with these indices, from a tensor of (m · samples, …)."""
    by_sample = tensor.unflatten(0, (-1, samples))
    if indices[-1] - indices[0] + 1 == len(indices):
        return by_sample.narrow(1, indices[0], len(indices)).flatten(0, 1)
    return by_sample.index_select(1, torch.tensor(indices, device=tensor.device)).flatten(0, 1)

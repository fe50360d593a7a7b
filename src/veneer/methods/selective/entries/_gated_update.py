"""A dense update with hard concrete gates, its pruning to a number of entries, and their storage as values and indices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.hard_concrete import deterministic_gate, logistic_noise, open_probability, sampled_gate
from veneer.injection.errors import StateError

from ._entries import Entries, SparseAdapter


class GatedUpdate(SparseAdapter):
    """W' = W + z_g ∘ z ∘ `delta`; with `fixed`, W' = W + `kept` ∘ `delta`; after `store`, a `SparseAdapter` of shared entries.

    Args:
        shape: of W. `groups`: shape of the gates of groups, which broadcasts to W, or None.
        logit: initial logits. `lower`, `upper`: interval of the stretched gates.
    Attributes:
        logits, group_logits: a of W's shape and a_g. `delta`: of W's shape. All are None after `store`.
        kept, fixed: buffers, the entries that remain (W's shape), and () True after they were chosen.
        noise, group_noise: logistic noise of the current training pass, or None.
    """

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True
    delta: nn.Parameter | None
    logits: nn.Parameter | None
    group_logits: nn.Parameter | None
    kept: Tensor
    fixed: Tensor
    noise: Tensor | None
    group_noise: Tensor | None

    def __init__(
        self, name: str, shape: Sequence[int], groups: Sequence[int] | None, logit: float, lower: float, upper: float
    ) -> None:
        super().__init__(name)
        self.lower, self.upper = lower, upper
        self.delta = nn.Parameter(torch.zeros(tuple(shape)))
        self.logits = nn.Parameter(torch.full(tuple(shape), logit))
        self.group_logits = nn.Parameter(torch.full(tuple(groups), logit)) if groups is not None else None
        self.register_buffer("kept", torch.ones(tuple(shape), dtype=torch.bool))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))
        self.register_buffer("noise", None, persistent=False)
        self.register_buffer("group_noise", None, persistent=False)

    @property
    def is_stored(self) -> bool:
        """True after `store`."""
        return self.delta is None

    def weight(self, weight: Tensor) -> Tensor:
        """W with the update."""
        return super().weight(weight) if self.is_stored else weight + self.update() * self.strength

    def update(self) -> Tensor:
        """The gated update, or that of the remaining entries."""
        assert self.delta is not None
        gates = self.gates()
        return torch.where(self.fixed, self.kept.to(gates.dtype), gates) * self.delta

    def gates(self) -> Tensor:
        """z_g ∘ z: sampled in training, without noise else.

        Raises:
            StateError: no noise was sampled for this training pass.
        """
        if self.training and self.noise is None:
            message = (
                f"{self.name}: a training pass without sampled gates. Call attachment.begin_pass(seed, step) before each forward "
                "pass, or model.eval() for gates without noise."
            )
            raise StateError(message, where=self.name, given="training", expected="begin_pass")
        return self._gates(self.noise, self.group_noise) if self.training else self._gates()

    def _gates(self, noise: Tensor | None = None, group_noise: Tensor | None = None) -> Tensor:
        assert self.logits is not None
        gates = self._gate(self.logits, noise)
        return gates if self.group_logits is None else gates * self._gate(self.group_logits, group_noise)

    def _gate(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return deterministic_gate(logits, self.lower, self.upper)
        return sampled_gate(logits, noise, self.lower, self.upper)

    def sample_noise(self, *key: object) -> None:
        """Samples the noise of a training pass, a function of `key` and of the name of the site."""
        assert self.logits is not None
        device = self.logits.device
        if device.type == "meta":
            self.noise, self.group_noise = torch.zeros_like(self.logits), torch.zeros((), device=device)
            return
        digest = hashlib.blake2b(repr((*key, self.name)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # on the CPU: equal on every device
        self.noise = logistic_noise(self.logits.shape, generator, self.logits.dtype).to(device)
        if self.group_logits is not None:
            self.group_noise = logistic_noise(self.group_logits.shape, generator, self.logits.dtype).to(device)

    def omit_noise(self) -> None:
        """No noise, for passes with fixed entries, which have no gates."""
        self.noise = self.group_noise = self.fixed.new_zeros((), dtype=torch.float32)

    def expected_open(self) -> Tensor:
        """Expected number of open gates, ()."""
        assert self.logits is not None
        count = open_probability(self.logits, self.lower, self.upper).sum()
        if self.group_logits is not None:
            count = count + open_probability(self.group_logits, self.lower, self.upper).sum()
        return count

    @torch.no_grad()
    def evaluated_update(self) -> Tensor:
        """The update without noise, (entries,)."""
        assert self.delta is not None
        return (self._gates() * self.delta).flatten()

    @torch.no_grad()
    def keep(self, update: Tensor, kept: Tensor) -> None:
        """Fixes the entries. `update`, `kept`: (entries,), the values with their gates, and which of them remain."""
        assert self.delta is not None
        self.kept.copy_(kept.view_as(self.kept))
        self.delta.copy_((update * kept).view_as(self.delta))
        self.fixed.fill_(True)

    def store(self, entries: Entries) -> None:
        """Replaces all tensors by the entries that all sites of a tower share."""
        self.delta = self.logits = self.group_logits = None
        for name in ("kept", "fixed", "noise", "group_noise"):
            setattr(self, name, None)
        self.add_module("shared", entries)

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Checks the indices of the file of a finished run."""
        if self.is_stored:
            super().check_state(tensors)

    def after_load(self) -> None:
        """Reads the number of entries of each tensor of a finished run."""
        if self.is_stored:
            super().after_load()


def is_fixed(adapters: Sequence[GatedUpdate]) -> bool:
    """True if the entries are chosen; all adapters of an attachment choose them in one step."""
    return not adapters[0].fixed.is_meta and bool(adapters[0].fixed)


@torch.no_grad()
def fix_largest(adapters: Sequence[GatedUpdate], count: int) -> None:
    """Fixes the `count` entries of all adapters together with the largest |update|."""
    updates = [adapter.evaluated_update() for adapter in adapters]
    flat = torch.cat([update.abs().to(updates[0].device) for update in updates])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(count, sorted=False).indices] = True
    for adapter, update, part in zip(adapters, updates, kept.split([len(u) for u in updates]), strict=True):
        adapter.keep(update, part.to(update.device))


@torch.no_grad()
def store_entries(adapters: Sequence[GatedUpdate], count: int) -> None:
    """Replaces the fixed entries of all adapters, `count` of them, by values and indices."""
    kept = torch.cat([adapter.kept.flatten() for adapter in adapters])
    deltas = [adapter.delta.flatten() for adapter in adapters if adapter.delta is not None]
    entries = Entries([len(delta) for delta in deltas], count, [adapter.name for adapter in adapters])
    entries.to(deltas[0].device, deltas[0].dtype).train(adapters[0].training)
    indices = kept.nonzero().flatten()
    entries.select(indices)
    entries.values.copy_(torch.cat(deltas)[indices])
    for adapter in adapters:
        adapter.store(entries)


def by_tower(adapters: Iterable[tuple[Any, Any]]) -> list[list[GatedUpdate]]:
    """The adapters of each tower that are not stored as entries."""
    towers: dict[str, list[GatedUpdate]] = {}
    for site, adapter in adapters:
        if isinstance(adapter, GatedUpdate) and not adapter.is_stored:
            towers.setdefault(site.component, []).append(adapter)
    return list(towers.values())

"""What an attachment has put on its host, how it came there, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..composition.batch_routing import Batch
from ..conditions import set_call_conditions
from ..errors import HostChanged, StateError, UnsupportedSite
from ..seams.adapter_calls import is_tracing
from ..seams.seam import Seam
from ..seams.seam_choice import seams_for
from ..seams.weight_seam import Carrier
from .extra_parameters import Trained
from .integrity import Watch
from .layer_order import Beneath, link
from .model_state import close, lookup, open_ledger, peek
from .plan import Plan

if TYPE_CHECKING:
    from .attachment import Attachment


class Joined:
    """Seams, hooks at the towers' doors, guards and trained base parameters of one attachment.

    Attributes:
        seams: empty unless joined. `trained`: the base parameters named in `train`.
        batches: of each tower by its id, while samples of a batch differ.
    """

    def __init__(self, attachment: Attachment, planned: Plan) -> None:
        self.attachment, self.parts, self.towers = attachment, planned.parts, planned.towers
        self.trained = Trained(planned.towers, planned.extras)
        self.seams: list[Seam] = []
        self.batches: dict[int, Batch] = {}
        self._guards: dict[tuple[str, str], Any] = {}
        self._doors: list[Any] = []

    def join(self) -> None:
        """Install everything. A failure leaves what `leave` can take away."""
        for tower in self.towers.values():
            self._freeze(tower)  # before seams move keys, because flags are kept by name
        for _, seam in seams_for(self.towers, self.parts):
            self.seams.append(seam)
            seam.join(self.attachment.name)
        self._order()
        guarded = dict.fromkeys((site.component, site.guard) for site, _ in self.parts if site.guard)
        self._guards = {(component, path): lookup(self.towers[component], path) for component, path in guarded}
        self._watch = Watch(self.seams, [(self.towers[component], path) for component, path in guarded])
        for tower in self.towers.values():
            door = tower.register_forward_pre_hook(self._at_door, with_kwargs=True, prepend=True)  # seams may be there as well
            self._doors.append(door)
        self.trained.start(self._others())
        for site, adapter in self.parts:
            tower = self.towers[site.component]
            if adapter.training != tower.training:
                adapter.train(tower.training)
            adapter.enter(tower)

    def _freeze(self, tower: nn.Module) -> None:
        ledger = open_ledger(tower)
        trained = {id(p) for other in ledger.attachments for p in other.parameters()}
        ledger.attachments.append(self.attachment)
        for module in tower.modules():
            for p in module._parameters.values():
                if p is not None and id(p) not in trained:
                    p.requires_grad_(False)

    def leave(self) -> None:
        """Undo `join`, also half of one, bitwise."""
        for handle in self._doors:
            handle.remove()
        for seam in reversed(self.seams):
            seam.uninstall()
        self.trained.stop(self._others())
        for tower in self.towers.values():
            ledger = peek(tower)
            if ledger is not None and self.attachment in ledger.attachments:
                ledger.attachments.remove(self.attachment)
            close(tower)
        self.link()
        for _, adapter in self.parts:
            adapter.leave()
        self.seams, self._doors, self._guards = [], [], {}

    def join_again(self) -> None:
        """Take the place in the order of attaching: what was attached later acts later, also after an unmerge."""
        ledgers = [open_ledger(tower).attachments for tower in self.towers.values()]
        later = dict.fromkeys(a for known in ledgers for a in known[known.index(self.attachment) :] if not a.merged)
        for attachment in later:
            for seam in attachment._joined.seams:
                seam.uninstall()
                seam.join(attachment.name)
        for attachment in later:
            attachment._joined._order(strict=False)

    def _order(self, strict: bool = True) -> None:
        """Let what was attached before act first, in the weights where it must.

        Raises:
            UnsupportedSite: it cannot; without `strict` it acts in the calls then, after what is in the weights.
        """
        for beneath in self.link():
            try:
                lacking = [*beneath.lacking()]
            except UnsupportedSite:
                if strict:
                    raise
                continue
            for site in lacking:
                carrier = Carrier(self.towers[site.component], site)
                carrier.idle = all(seam.idle for seam in beneath.weights.values())
                self.seams.append(carrier)
                carrier.join(self.attachment.name)
        self.link()

    def link(self) -> list[Beneath]:
        """Tell all seams of the towers anew which of them act beneath which. Gives what is beneath this attachment's."""
        mine: list[Beneath] = []
        for tower in self.towers.values():
            ledger = peek(tower)
            for attachment, found in link(tower, ledger.attachments if ledger else ()):
                mine += found if attachment is self.attachment else ()
        return mine

    def _others(self) -> list[Trained]:
        ledgers = [ledger for tower in self.towers.values() if (ledger := peek(tower)) is not None]
        return [a.trained for ledger in ledgers for a in ledger.attachments if a is not self.attachment]

    def _at_door(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        acts = is_tracing() and self.attachment.conditions is not None  # what is run again may be on then
        if torch.compiler.is_compiling():  # a guard on the strength would compile anew
            acts = True
        else:
            on = self.attachment._on and self.attachment._scale != 0
            acts = acts or on
            self.attachment.check() if on else self.trained.check()  # adapters that are off cannot be bypassed
        if acts and self.attachment.method.conditions:
            set_call_conditions(self.attachment, module, args, kwargs)
        batch = self.batches.get(id(module))
        if batch is not None:
            batch.enter(args, kwargs)

    def refuse_mixed(self) -> None:
        """Raise `StateError` while samples of a batch differ: what leaves now would take others' rows along."""
        if self.batches:
            message = f"'{self.attachment.name}' is in a mixed batch. Leave the context of `mixed` first."
            raise StateError(message, where=self.attachment.name, given="mixed")

    def check(self, merged: bool) -> None:
        """Raise if the host was rebuilt or fused since, so that adapters would be bypassed.

        Raises:
            HostChanged: naming the site and what changed.
        """
        self.trained.check()
        if self._watch.unchanged(merged):
            return
        for seam in () if merged else self.seams:
            if not seam.is_intact():
                raise HostChanged(
                    f"{seam.sites[0].name}: the host replaced the module after attach, so '{self.attachment.name}' no longer "
                    "runs there. Detach, change the host, then attach.",
                    where=seam.sites[0].name,
                    given="replaced",
                )
        for site, _ in self.parts:
            if site.guard and lookup(self.towers[site.component], site.guard) != self._guards[site.component, site.guard]:
                raise HostChanged(
                    f"{site.name}: '{site.guard}' changed after attach, so '{self.attachment.name}' is bypassed there. "
                    "Undo it (for fused projections: unfuse_qkv_projections()), or detach, change the host, then attach.",
                    where=site.name,
                    given=site.guard,
                )

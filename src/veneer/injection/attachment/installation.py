"""Installs an attachment on its host (seams, hooks on the towers, integrity checks, trainable base parameters) and removes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..composition.merge import MergeReport, OriginalWeights, merge_weights, restore_weights
from ..composition.mixed_batch_rows import Batch
from ..errors import HostChanged, StateError, UnsupportedSite
from ..quantized_weight import keep_unpacked
from ..registry import host_of
from ..seams.adapter_calls import is_tracing
from ..seams.seam import Seam
from ..seams.seam_choice import seams_for
from ..seams.weight_seam import PassThroughSeam, WeightSeam
from .condition_scope import set_call_conditions
from .extra_parameters import ExtraParameters
from .integrity import IntegrityCheck
from .layer_order import LayerOrdering, link_seams_of_tower
from .model_state import (
    MergeRecord,
    drop_unused_model_state,
    ensure_model_state,
    find_model_state,
    lookup,
    reject_sharded,
)
from .plan import Plan
from .protocol import AttachmentProtocol


class Installation:
    """Everything one attachment installed on the model: hooks, parametrizations, integrity checks, trainable base parameters.

    Attributes:
        seams: installed seams, empty unless installed. `trained`: the base parameters named in `train`.
        batches: by the id of a tower, the mixed batch that runs on it. `composition`: the tree that it is in, or None.
    """

    def __init__(self, attachment: AttachmentProtocol, planned: Plan) -> None:
        self.attachment, self.parts, self.towers = attachment, planned.parts, planned.towers
        self.trained = ExtraParameters(planned.towers, planned.extras)
        self.seams: list[Seam] = []
        self.batches: dict[int, Batch] = {}
        self.composition: Any = None
        self._guards: dict[tuple[str, str], Any] = {}
        self._original_weights: OriginalWeights = {}
        self._tower_hooks: list[Any] = []

    def install(self) -> None:
        """Installs everything. After a failure, `uninstall` removes what was installed."""
        for tower in self.towers.values():
            keep_unpacked(tower)
            self._freeze(tower)  # before seams rename parameters, because flags are stored by name
        for _, seam in seams_for(self.towers, self.parts):
            self.seams.append(seam)
            seam.join(self.attachment.name)
        order_seams(self.attachment)
        guarded = dict.fromkeys((site.component, site.guard) for site, _ in self.parts if site.guard)
        self._guards = {(component, path): lookup(self.towers[component], path) for component, path in guarded}
        self._integrity = IntegrityCheck(self.seams, [(self.towers[component], path) for component, path in guarded])
        for tower in self.towers.values():  # first, because seams may have hooks on the tower itself
            hook = tower.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
            self._tower_hooks.append(hook)
            host = host_of(tower)
            self._tower_hooks.extend(host.gradient_hooks(tower) if host is not None else ())
        self.trained.unfreeze(self._others())
        for site, adapter in self.parts:
            tower = self.towers[site.component]
            if adapter.training != tower.training:
                adapter.train(tower.training)
            adapter.enter(tower)

    def _freeze(self, tower: nn.Module) -> None:
        tower_state = ensure_model_state(tower)
        trainable = {id(p) for other in tower_state.attachments for p in other.parameters()}
        tower_state.attachments.append(self.attachment)
        for module in tower.modules():
            for p in module._parameters.values():
                if p is not None and id(p) not in trainable:
                    p.requires_grad_(False)

    def uninstall(self) -> None:
        """Undoes `install`, also a partial one, bitwise."""
        for handle in self._tower_hooks:
            handle.remove()
        for seam in reversed(self.seams):
            seam.uninstall()
        self.trained.restore(self._others())
        for tower in self.towers.values():
            tower_state = find_model_state(tower)
            if tower_state is not None and self.attachment in tower_state.attachments:
                tower_state.attachments.remove(self.attachment)
            drop_unused_model_state(tower)
        link_seams(self.attachment)
        for _, adapter in self.parts:
            adapter.leave()
        self.seams.clear()  # the attachment has the same list
        self._tower_hooks, self._guards = [], {}

    def merge(self, strength: float, requantize: bool = False) -> MergeReport:
        """Merges the adapters into the weights, and removes the seams. All or nothing. `strength`: the present one."""
        reject_sharded(self.towers.values(), "merge", "Save the adapters, and merge them into a base model that is not sharded.")
        original, report = merge_weights(self.towers, self.parts, requantize)
        try:
            for seam in self.seams:
                seam.uninstall()
        except BaseException:
            restore_weights(self.towers, original)
            self.reinstall()
            raise
        self._original_weights, self.attachment.merged = original, True
        link_seams(self.attachment)
        for tower in self.towers.values():
            ensure_model_state(tower).merged.append(MergeRecord(self.attachment, strength))
        return report

    def unmerge(self) -> None:
        """Restores the original weights, and installs the seams again.

        Raises:
            StateError: another attachment was merged later.
        """
        for tower in self.towers.values():
            last = ensure_model_state(tower).merged[-1]
            if last.attachment is not self.attachment:
                name = self.attachment.name
                message = f"'{last.name}' was merged after '{name}'. Unmerge it first."
                raise StateError(message, where=name, given="merged", expected=last.name)
        reject_sharded(self.towers.values(), "unmerge", "Load the base model again.")
        restore_weights(self.towers, self._original_weights)
        for tower in self.towers.values():
            ensure_model_state(tower).merged.pop()
        self._original_weights, self.attachment.merged = {}, False
        self.reinstall()

    def reinstall(self) -> None:
        """Installs the seams again after an unmerge, and those of later attachments after them: the order of attaching stays."""
        attached = [ensure_model_state(tower).attachments for tower in self.towers.values()]
        later = dict.fromkeys(a for each in attached for a in each[each.index(self.attachment) :] if not a.merged)
        for attachment in later:
            for seam in attachment.seams:
                seam.uninstall()
                seam.join(attachment.name)
        for attachment in later:
            order_seams(attachment, strict=False)

    def _others(self) -> list[ExtraParameters]:
        states = [state for tower in self.towers.values() if (state := find_model_state(tower)) is not None]
        return [a.trained for state in states for a in state.attachments if a is not self.attachment]

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enabled = is_tracing() and self.attachment.conditions is not None  # a replay may have adapters enabled
        if torch.compiler.is_compiling():  # a guard on the strength would compile again
            enabled = True
        else:
            active = self.attachment.is_enabled and self.attachment.scale != 0
            enabled = enabled or active
            self.attachment.check() if active else self.trained.check()  # disabled adapters cannot be bypassed
            if active:
                self.attachment.require_selection()
                self.attachment.require_task()
        if enabled and self.attachment.method.conditions:
            set_call_conditions(self.attachment, module, args, kwargs)
        batch = self.batches.get(id(module))
        if batch is not None:
            batch.enter(args, kwargs)

    def reject_sharded_weights(self) -> None:
        """Raises `HostChanged` if a tower with parametrized tensors is sharded, which refers to them by their present names."""
        towers = dict.fromkeys(seam.__dict__["tower"] for seam in self.seams if isinstance(seam, WeightSeam))
        reject_sharded(towers, "detach", "Load the base model again.")

    def refuse_mixed(self) -> None:
        """Raises `StateError` inside `mixed`: the seams of one attachment run the rows of the others."""
        if self.batches:
            message = f"'{self.attachment.name}' is in a mixed batch. Leave the context of `mixed` first."
            raise StateError(message, where=self.attachment.name, given="mixed")

    def refuse_composed(self, what: str) -> None:
        """Raises `StateError` while a node of a composition runs the adapters. `what`: the operation."""
        if self.composition is not None and self.composition.is_routed:
            message = f"{what}: '{self.attachment.name}' is in {self.composition.node!r}. Call undo() of the composition first."
            raise StateError(message, where=self.attachment.name, given="composed")

    def check(self, merged: bool) -> None:
        """Raises if the host was rebuilt or fused since attach, so that adapters would be bypassed.

        Raises:
            HostChanged: naming the site and what changed.
        """
        self.trained.check()
        if self._integrity.is_intact(merged):
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


def order_seams(attachment: AttachmentProtocol, strict: bool = True) -> None:
    """Applies earlier attachments before this one, in the weights where that is necessary.

    Raises:
        UnsupportedSite: an earlier adapter has no form for that. Without `strict` it acts in the calls, after the weights.
    """
    for order in link_seams(attachment):
        try:
            missing = [*order.missing_sites()]
        except UnsupportedSite:
            if strict:
                raise
            continue
        for site in missing:
            seam = PassThroughSeam(attachment.towers[site.component], site)
            seam.idle = all(later.idle for later in order.weights.values())
            attachment.seams.append(seam)
            seam.join(attachment.name)
    for order in link_seams(attachment):
        call = next((c for c in order.calls if strict and c.place is not None and order.may_apply(c)), None)
        if call is not None:
            site = call.sites[0].name
            message = (
                f"{site}: '{attachment.name}' changes the weight after adapters that run in a composition or a mixed batch. "
                "Attach it before compose."
            )
            raise UnsupportedSite(message, site=site, method=attachment.method.name, where=attachment.name, given="composed")


def link_seams(attachment: AttachmentProtocol) -> list[LayerOrdering]:
    """Updates the order of all seams on the attachment's towers. Returns the earlier call seams under its weight seams."""
    own: list[LayerOrdering] = []
    for tower in attachment.towers.values():
        tower_state = find_model_state(tower)
        for other, earlier in link_seams_of_tower(tower, tower_state.attachments if tower_state else ()):
            own += earlier if other is attachment else ()
    return own

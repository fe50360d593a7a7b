"""Keeps the order of attachments on one layer when an earlier one uses a forward hook and a later one parametrizes the weight.

A forward hook runs after the parametrizations of its layer, so the earlier attachment would act last. If both add a delta, the
result is the same. Otherwise `LayerOrdering` applies the earlier adapter's weight and bias forms inside the parametrization,
before the later adapter, and the hook does nothing while the later one is enabled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from ..adapter_forms import BiasAdapter, WeightAdapter
from ..errors import UnsupportedSite
from ..seams.call_seam import CallSeam
from ..seams.effective_weight import apply_change, changed_tensors
from ..seams.seam import Seam
from ..seams.weight_seam import WeightSeam
from ..sites import NormSite, ParamSite, WeightSite
from .protocol import AttachmentProtocol

TENSOR_SITES = (WeightSite, ParamSite, NormSite)


class LayerOrdering:
    """Call seams of earlier attachments on a module whose tensors a later attachment parametrizes.

    Args:
        module: the layer. `weights`: parameter name to the weight seam of the later attachment.
        calls: call seams of the earlier attachments, in the order of attaching.
    """

    def __init__(self, module: nn.Module, weights: dict[str, WeightSeam], calls: Sequence[CallSeam]) -> None:
        self.module, self.weights, self.calls = module, weights, tuple(calls)

    def applied(self) -> list[CallSeam]:
        """The call seams currently applied in the weights: all enabled ones up to the last that does not commute."""
        if all(seam.is_disabled() for seam in self.weights.values()):
            return []
        enabled = [call for call in self.calls if not call.is_disabled() and not self._is_applied_earlier(call)]
        return [call for call in self._must_precede(enabled) if changed_tensors(call) <= self.weights.keys()]

    def applies(self, call: CallSeam) -> bool:
        """True if a call seam is currently applied in the weights."""
        return any(call is other for other in self.applied())

    def may_apply(self, call: CallSeam) -> bool:
        """True if a call seam is applied in the weights when everything is enabled."""
        return any(call is other for other in self._must_precede(self.calls))

    def apply(self, param: str, tensor: Tensor) -> Tensor:
        """The tensor with the changes of the call seams that are currently applied in the weights."""
        for call in self.applied():
            if param in changed_tensors(call):
                tensor = apply_change(call, self.module, param, tensor)
        return tensor

    def missing_sites(self) -> Iterator[ParamSite]:
        """Tensors to parametrize as well, because an earlier adapter changes weight and bias together.

        Raises:
            UnsupportedSite: an earlier adapter cannot be applied in the weights.
        """
        earlier = self._must_precede(self.calls)
        changes_several = any(len(changed_tensors(call)) > 1 or _needs_missing_bias(call) for call in earlier)
        for call in earlier:
            _reject_without_form(call, next(iter(self.weights.values())))
        names = {name for call in (earlier if changes_several else ()) for name in changed_tensors(call)}
        for name in sorted(names - self.weights.keys()):
            site = earlier[0].sites[0]
            yield ParamSite(
                name=f"{site.name}.{name}", role=site.role, component=site.component, path=site.path, param=name, shape=()
            )

    def _is_applied_earlier(self, call: CallSeam) -> bool:
        """True if a call seam is applied in the weights of an attachment between it and this one."""
        for order in call.layer_orders:
            if order is self:
                return False
            if order.applies(call):
                return True
        return False

    def _must_precede(self, calls: Sequence[CallSeam]) -> Sequence[CallSeam]:
        """The call seams up to the last one that does not commute with the weight seams."""
        end = 0
        for i, call in enumerate(calls):
            if not self._commutes(call):
                end = i + 1
        return calls[:end]

    def _commutes(self, call: CallSeam) -> bool:
        """True if the order of a call seam and the weight seams is irrelevant: other rows, other tensors, or only sums."""
        names = changed_tensors(call)
        for name, seam in self.weights.items():
            for site, later in zip(seam.sites, seam.adapters, strict=False) if name in names else ():
                for earlier_site, earlier in zip(call.sites, call.adapters, strict=True):
                    if not (_are_disjoint(site.rows, earlier_site.rows) or (later.adds and earlier.adds)):
                        return False
        return True


def _are_disjoint(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    """True for row ranges that do not overlap; None means all rows."""
    return a is not None and b is not None and (a[1] <= b[0] or b[1] <= a[0])


def _reject_without_form(call: CallSeam, later: WeightSeam) -> None:
    """Raises `UnsupportedSite` if the adapters of a call seam cannot be applied to the module's own tensors."""
    site, adapter = call.sites[0], type(call.adapters[0]).__name__
    if not isinstance(call.adapters[0], WeightAdapter):
        reason = f"{adapter} has no weight form"
    elif _needs_missing_bias(call):
        reason = f"{adapter} shifts the output, and the layer has no bias to add the shift to"
    else:
        return
    later_name = type(later.adapters[0]).__name__
    raise UnsupportedSite(
        f"{site.name}: {adapter} is already attached with a forward hook, which would run after {later_name} changes the weight, "
        f"and it cannot be applied in the weight: {reason}. Attach {later_name} first, or select other sites.",
        site=site.name,
        given=later_name,
    )


def _needs_missing_bias(call: CallSeam) -> bool:
    """True if the adapters change the bias, and the module itself has no bias parameter."""
    site = call.sites[0]
    return isinstance(call.adapters[0], BiasAdapter) and (not site.bias or site.bias.rpartition(".")[0] != site.path)


def link_seams_of_tower(
    tower: nn.Module, attached: Iterable[AttachmentProtocol]
) -> list[tuple[AttachmentProtocol, list[LayerOrdering]]]:
    """Links the seams of a tower so that earlier attachments are applied before later ones.

    Args:
        attached: attachments of the tower, in the order of attaching.
    Returns:
        Per attachment, the earlier call seams on the modules that it parametrizes.
    """
    calls: dict[int, list[CallSeam]] = {}
    orders: list[tuple[AttachmentProtocol, list[LayerOrdering]]] = []
    for attachment in attached:
        seams = [] if attachment.merged else [s for s in attachment.seams if s.__dict__["tower"] is tower]
        by_module = _weight_seams_by_module(seams)
        orderings = [LayerOrdering(module, weights, calls[id(module)]) for module, weights in by_module if id(module) in calls]
        orders.append((attachment, [_connect(order) for order in orderings]))
        for seam in seams:
            if isinstance(seam, CallSeam) and isinstance(seam.sites[0], TENSOR_SITES) and seam.__dict__["joined"]:
                seam.layer_orders = ()
                calls.setdefault(id(seam.__dict__["_owner"]), []).append(seam)
    return orders


def _weight_seams_by_module(seams: Iterable[Seam]) -> list[tuple[nn.Module, dict[str, WeightSeam]]]:
    """Pairs of a module and its weight seams by parameter name, of one attachment."""
    by_module: dict[int, tuple[nn.Module, dict[str, WeightSeam]]] = {}
    for seam in seams:
        if isinstance(seam, WeightSeam) and seam.__dict__["joined"]:
            seam.layer_order = None
            target = seam.__dict__["_target"]
            by_module.setdefault(id(target), (target, {}))[1][seam.param] = seam
    return [*by_module.values()]


def _connect(order: LayerOrdering) -> LayerOrdering:
    """Makes the seams refer to their order."""
    for seam in order.weights.values():
        seam.layer_order = order
    for call in order.calls:
        call.layer_orders = (*call.layer_orders, order)
    return order

"""Order of attaching on one layer: call adapters of earlier attachments beneath the weight adapters of later ones.

A hook on a called layer acts after everything that is in the layer's weights. That is the order of attaching where the hook was
attached later, and makes no difference where both are sums. Else the earlier adapter must act in the weights, before the later
one: `Beneath` applies its weight and bias forms there, and its hook does nothing as long as the later one is enabled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from ..adapter_forms import BiasAdapter, WeightAdapter
from ..errors import UnsupportedSite
from ..seams.call_seam import CallSeam
from ..seams.effective_weight import change_of, tensors_of
from ..seams.seam import Seam
from ..seams.weight_seam import WeightSeam
from ..sites import NormSite, ParamSite, WeightSite
from .protocol import AttachmentProtocol

TENSORS = (WeightSite, ParamSite, NormSite)


class Beneath:
    """Call seams of earlier attachments on the module whose tensors one attachment changes.

    Args:
        module: the layer. `weights`: parameter name to the later attachment's seam. `calls`: in the order of attaching.
    """

    def __init__(self, module: nn.Module, weights: dict[str, WeightSeam], calls: Sequence[CallSeam]) -> None:
        self.module, self.weights, self.calls = module, weights, tuple(calls)

    def acting(self) -> list[CallSeam]:
        """The call seams that act in the weights now: up to the last enabled one that does not commute."""
        if all(seam.is_disabled() for seam in self.weights.values()):
            return []
        free = [call for call in self.calls if not call.is_disabled() and not self._taken_before(call)]
        return [call for call in self._ordered(free) if tensors_of(call) <= self.weights.keys()]

    def takes(self, call: CallSeam) -> bool:
        """True if a call seam acts in the weights now."""
        return any(call is other for other in self.acting())

    def concerns(self, call: CallSeam) -> bool:
        """True if a call seam acts in the weights while everything is enabled."""
        return any(call is other for other in self._ordered(self.calls))

    def apply(self, param: str, tensor: Tensor) -> Tensor:
        """The tensor with the changes of the call seams that act in the weights."""
        for call in self.acting():
            if param in tensors_of(call):
                tensor = change_of(call, self.module, param, tensor)
        return tensor

    def lacking(self) -> Iterator[ParamSite]:
        """Tensors that the later attachment must carry as well, because an earlier adapter changes weight and bias together.

        Raises:
            UnsupportedSite: an earlier adapter cannot act in the weights.
        """
        acting = self._ordered(self.calls)
        together = [call for call in acting if len(tensors_of(call)) > 1 or _reach(call)]
        for call in acting:
            refuse_without_form(call, next(iter(self.weights.values())))
        names = {name for call in (acting if together else ()) for name in tensors_of(call)}
        for name in sorted(names - self.weights.keys()):
            site = acting[0].sites[0]
            yield ParamSite(
                name=f"{site.name}.{name}", role=site.role, component=site.component, path=site.path, param=name, shape=()
            )

    def _taken_before(self, call: CallSeam) -> bool:
        for beneath in call.layer_orders:
            if beneath is self:
                return False
            if beneath.takes(call):
                return True
        return False

    def _ordered(self, calls: Sequence[CallSeam]) -> Sequence[CallSeam]:
        last = 0
        for i, call in enumerate(calls):
            if not self._commutes(call):
                last = i + 1
        return calls[:last]

    def _commutes(self, call: CallSeam) -> bool:
        """True if the order of a call seam and the weight seams makes no difference: other rows, other tensors, or sums."""
        names = tensors_of(call)
        for name, seam in self.weights.items():
            for site, adapter in zip(seam.sites, seam.adapters, strict=False) if name in names else ():
                for other, earlier in zip(call.sites, call.adapters, strict=True):
                    if not (apart(site.rows, other.rows) or (adapter.adds and earlier.adds)):
                        return False
        return True


def apart(one: tuple[int, int] | None, other: tuple[int, int] | None) -> bool:
    """True for rows that do not overlap."""
    return one is not None and other is not None and (one[1] <= other[0] or other[1] <= one[0])


def refuse_without_form(call: CallSeam, later: WeightSeam) -> None:
    """Raise `UnsupportedSite` if a call seam has no form in the module's own tensors."""
    site, adapter = call.sites[0], type(call.adapters[0]).__name__
    if not isinstance(call.adapters[0], WeightAdapter):
        why = f"{adapter} has no weight form"
    elif _reach(call):
        why = f"{adapter} shifts the output, and the layer has no bias that could take the shift"
    else:
        return
    raise UnsupportedSite(
        f"{site.name}: {adapter} is attached already, and {type(later.adapters[0]).__name__} changes the weight beneath it, so "
        f"that the earlier one would act last: {why}. Attach the later one first, or select other sites.",
        site=site.name,
        given=type(later.adapters[0]).__name__,
    )


def _reach(call: CallSeam) -> bool:
    """True if adapters change a bias that is not a parameter of the module itself."""
    site = call.sites[0]
    return isinstance(call.adapters[0], BiasAdapter) and (not site.bias or site.bias.rpartition(".")[0] != site.path)


def link(tower: nn.Module, attached: Iterable[AttachmentProtocol]) -> list[tuple[AttachmentProtocol, list[Beneath]]]:
    """Tell the seams of a tower, in the order of attaching, which of them act beneath which.

    Returns:
        Of each attachment, what is beneath it.
    """
    calls: dict[int, list[CallSeam]] = {}
    found: list[tuple[AttachmentProtocol, list[Beneath]]] = []
    for attachment in attached:
        seams = [] if attachment.merged else [s for s in attachment.seams if s.__dict__["tower"] is tower]
        weights = _weights(seams)
        below = [Beneath(module, group, calls[id(module)]) for module, group in weights if id(module) in calls]
        found.append((attachment, [_connect(each) for each in below]))
        for seam in seams:
            if isinstance(seam, CallSeam) and isinstance(seam.sites[0], TENSORS) and seam.__dict__["joined"]:
                seam.layer_orders = ()
                calls.setdefault(id(seam.__dict__["_owner"]), []).append(seam)
    return found


def _weights(seams: Iterable[Seam]) -> list[tuple[nn.Module, dict[str, WeightSeam]]]:
    """Modules with the weight seams of one attachment, by parameter name."""
    found: dict[int, tuple[nn.Module, dict[str, WeightSeam]]] = {}
    for seam in seams:
        if isinstance(seam, WeightSeam) and seam.__dict__["joined"]:
            seam.layer_order = None
            target = seam.__dict__["_target"]
            found.setdefault(id(target), (target, {}))[1][seam.param] = seam
    return [*found.values()]


def _connect(beneath: Beneath) -> Beneath:
    for seam in beneath.weights.values():
        seam.layer_order = beneath
    for call in beneath.calls:
        call.layer_orders = (*call.layer_orders, beneath)
    return beneath

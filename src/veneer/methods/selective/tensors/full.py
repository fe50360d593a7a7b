"""Full fine-tuning: trains every parameter; the baseline of the other methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite, Site, WeightSite

from ._replacement import ReplacementAdapter, size_of


@dataclass(frozen=True)
class Full(Method):
    """W' = V for every weight, bias, norm and free parameter; V is initialized to W, and the base is not modified.

    So it detaches, switches and saves like any method, and a file holds a whole model. Memory, besides the base: V, its
    gradient and the optimizer state, and one W' per layer in each forward pass. Of two attached at once, the later one applies.
    Select fewer sites to train a part, such as `where="*@-2:"` for the last two blocks.

    Args:
        head_rate: ratio of a classification head's learning rate to that of the rest, because only the head is new.
    Counts: all parameters of the main tower; ViT-B/16 without a head 85,798,656.
    Source: the baseline of every paper of the field. Deviation: none in what is trained.
    """

    name: ClassVar[str] = "full"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "full fine-tuning, the baseline"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite), Need(ParamSite))
    default: ClassVar[tuple[str, ...]] = ("*",)
    learning_rate: ClassVar[float] = 5e-5

    head_rate: float = 20.0

    def __post_init__(self) -> None:
        if not self.head_rate > 0:
            raise OptionError.of("full", "head_rate", self.head_rate, "above 0")

    def build(self, site: WeightSite | ParamSite) -> ReplacementAdapter:
        """A tensor of the host's shape."""
        return ReplacementAdapter(site)

    def groups(self, adapters: Iterable[tuple[Site, Adapter]]) -> list[dict[str, Any]]:
        """The head, and the rest."""
        found = [(site.role in ("head", "bias.head"), p) for site, adapter in adapters for p in adapter.parameters()]
        head, rest = ([p for is_head, p in found if is_head == flag] for flag in (True, False))
        return [{"params": rest, "lr_scale": 1.0}, {"params": head, "lr_scale": self.head_rate}]

    def count(self, site: WeightSite | ParamSite) -> int:
        """Number of elements of the tensor."""
        return size_of(site)

"""Linear probing: trains only the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.injection.method import Method, Need
from veneer.injection.sites import ParamSite, WeightSite

from ._replacement import ReplacementAdapter, size_of


@dataclass(frozen=True)
class LinearProbe(Method):
    """y = V x + c on the frozen features x that enter the head; V and c are initialized from the host's head.

    The head is saved whole, so that loading gives the trained outputs on a backbone with any other head of the same size.
    Of two attached at once, the later one applies. All methods train a head with `train=("head",)`.
    Counts: K·(D + 1) for K classes of D features; ViT-B/16 with 1,000 classes 769,000.
    Source: the standard baseline; Alain, Bengio, Understanding intermediate layers using linear classifier probes, 2016, for
    probes of every layer; Kornblith et al., Do Better ImageNet Models Transfer Better?, CVPR 2019, for the last one. Deviation:
    gradient steps with the run's optimizer instead of a convex solver.
    """

    name: ClassVar[str] = "linear_probe"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    recommended_for: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Kornblith, Shlens, Le, Do Better ImageNet Models Transfer Better?, CVPR 2019"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, roles=("head",)), Need(ParamSite, roles=("bias.head",)))
    default: ClassVar[tuple[str, ...]] = ("head", "bias.head")
    learning_rate: ClassVar[float] = 3e-3

    def build(self, site: WeightSite | ParamSite) -> ReplacementAdapter:
        """The head's weight or bias."""
        return ReplacementAdapter(site)

    def count(self, site: WeightSite | ParamSite) -> int:
        """Number of elements of the tensor."""
        return size_of(site)

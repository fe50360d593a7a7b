"""Linear probing: the head is trained and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.injection.method import Method, Need
from veneer.injection.sites import ParamSite, WeightSite

from ._replacing import Replacing, size_of


@dataclass(frozen=True)
class LinearProbe(Method):
    """y = V x + c on the frozen features x that enter the head; V and c start as the host's own head.

    The head is held whole, so that loading gives the trained outputs on a backbone with any other head of the same size.
    Of two that are attached at once the later one counts. All methods train a head of their own with `train=("head",)`.
    Counts: K·(D + 1) for K classes of D features; ViT-B/16 with 1,000 classes 769,000.
    Source: the usual baseline; Alain, Bengio, Understanding intermediate layers using linear classifier probes, 2016, for probes
    of every layer; Kornblith et al., Do Better ImageNet Models Transfer Better?, CVPR 2019, for the last one. Deviation: gradient
    steps with the run's optimiser in place of a convex solver.
    """

    name: ClassVar[str] = "linear_probe"
    paper: ClassVar[str] = "Kornblith, Shlens, Le, Do Better ImageNet Models Transfer Better?, CVPR 2019"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, roles=("head",)), Need(ParamSite, roles=("bias.head",)))
    default: ClassVar[tuple[str, ...]] = ("head", "bias.head")
    learning_rate: ClassVar[float] = 3e-3

    def build(self, site: WeightSite | ParamSite) -> Replacing:
        """The head's weight or bias."""
        return Replacing(site)

    def count(self, site: WeightSite | ParamSite) -> int:
        """The tensor's size."""
        return size_of(site)

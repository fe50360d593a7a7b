"""Tip-Adapter: few-shot images vote for their labels, weighted by feature similarity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from veneer.injection.errors import OptionError, StateError, VeneerError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import FeatureSite, Site


class TipAdapterError(VeneerError, ValueError):
    """Images that cannot form a cache."""


class TipAdapterAdapter(Adapter):
    """logits + α·exp(−β(1 − f Fᵀ)) V, f = norm(x). V is one-hot by position: `keys` F (classes, shots, width).

    The first `counts[k]` entries of class k are valid, the others are empty.
    """

    applies_strength = True
    counts: Tensor

    def __init__(self, site: FeatureSite, method: TipAdapter) -> None:
        super().__init__()
        self.place, self.alpha, self.beta = site.name, method.alpha, method.beta
        keys = torch.zeros(site.classes, method.shots, site.width)
        if method.start == "random":
            keys = normalize(torch.randn(keys.shape), dim=-1)
        if method.train_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        filled = method.shots if method.start == "random" else 0
        self.register_buffer("counts", torch.full((site.classes,), filled))
        self.__dict__["seen"] = None

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: features (batch, width); y: logits (batch, classes)."""
        captured: list[Tensor] | None = self.__dict__["seen"]
        if captured is not None:
            captured.append(x.detach().clone())
        return y + self.votes(normalize(x, dim=-1) @ self.keys.flatten(0, 1).T, self.beta) * (self.strength * self.alpha)

    def votes(self, affinities: Tensor, beta: float) -> Tensor:
        """exp(−β(1 − A)) V: affinities f Fᵀ (batch, classes·shots) to (batch, classes)."""
        here = torch.arange(self.keys.shape[1], device=self.counts.device) < self.counts.unsqueeze(-1)
        return (torch.exp(beta * (affinities - 1)).unflatten(-1, self.keys.shape[:2]) * here).sum(-1)

    def capture_features(self, run: Callable[[Tensor], Any], pixels: Tensor) -> Tensor:
        """The features (batch, width) of images, in one forward pass of the model.

        Raises:
            StateError: the adapter is disabled, so that it sees no features.
        """
        captured: list[Tensor] = []
        self.__dict__["seen"] = captured
        try:
            run(pixels)
        finally:
            self.__dict__["seen"] = None
        if not captured:
            message = f"{self.place}: cannot prepare tip_adapter while it is disabled or at scale 0."
            raise StateError(message, where=self.place, given="disabled")
        return torch.cat(captured)

    def fill_cache(self, features: Tensor, labels: Tensor) -> None:
        """Fills the cache with features (n, width) and their labels (n,), class by class in order.

        Raises:
            TipAdapterError: a label outside the head's classes, or more images of a class than `shots`.
        """
        classes, shots, _ = self.keys.shape
        found = labels.unique(return_counts=True)
        if not len(labels) or labels.min() < 0 or labels.max() >= classes:
            raise TipAdapterError(
                f"{self.place}: expected at least one label, in 0 to {classes - 1}; got {found[0].tolist()}.",
                where="labels",
                given=found[0].tolist(),
                expected=classes,
            )
        counts = torch.bincount(labels, minlength=classes)
        if counts.max() > shots:
            raise TipAdapterError(
                f"{self.place}: class {int(counts.argmax())} has {int(counts.max())} images, but tip_adapter holds "
                f"{shots} per class. Attach it with shots={int(counts.max())}, or pass fewer images.",
                where="shots",
                given=int(counts.max()),
                expected=shots,
            )
        keys = torch.zeros_like(self.keys)
        for label in found[0].tolist():
            rows = features[labels == label]
            keys[label, : len(rows)] = normalize(rows.to(keys), dim=-1)
        with torch.no_grad():
            self.keys.copy_(keys)
            self.counts.copy_(counts)


@dataclass(frozen=True)
class TipAdapter(Method):
    """logits' = logits + α·exp(−β(1 − f Fᵀ)) V: F the normalized features of the training images, V their one-hot labels.

    Training-free: `prepare` fills the cache; until then it is empty and adds nothing. With `train_keys` (Tip-Adapter-F)
    F is trained from there. For another α or β, attach with them and load the state; `search` finds good values.

    Args:
        shots: maximum number of images per class; classes may have fewer.
        alpha: α, weight of the votes, relative to logits that CLIP multiplies by about 100.
        beta: β, how fast votes decay with distance.
        views: passes over the images in the batches of `prepare`, one after the other in the same order, each with its own
            augmentation; an image's key is the normalized mean over them.
        train_keys: train F.
        start: `empty`, or `random` unit vectors at every position: a cache for testing without images.
    Counts: 0, or shots·classes·width with `train_keys`; ImageNet with 16 shots on CLIP RN50 16,384,000.
    Source: Zhang et al., Tip-Adapter, ECCV 2022, section 3, and its code. Deviations: the code averages 10 augmented views
    (`views=10`); before the search its α is 1.17 for ImageNet, Food101, SUN397 and Pets, 2 to 10 for other datasets; it trains F
    with AdamW, epsilon 1e-4, learning rate 1e-3.
    """

    name: ClassVar[str] = "tip_adapter"
    uses: ClassVar[tuple[str, ...]] = ("few_labels",)
    recommended_for: ClassVar[tuple[str, ...]] = ("few_labels",)
    paper: ClassVar[str] = "Zhang et al., Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, ECCV 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(FeatureSite, roles=("logits",), where={"read": ...}),)
    default: ClassVar[tuple[str, ...]] = ("logits",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    prepares: ClassVar[Literal["", "once", "epoch"]] = "once"

    shots: int = 16
    alpha: float = 1.0
    beta: float = 1.0
    views: int = 1
    train_keys: bool = False
    start: Literal["empty", "random"] = "empty"

    def __post_init__(self) -> None:
        for word in ("shots", "views"):
            if getattr(self, word) < 1:
                raise OptionError.of("tip_adapter", word, getattr(self, word), "at least 1")
        if self.alpha < 0 or self.beta < 0:
            message = f"tip_adapter: alpha and beta must be at least 0, got {self.alpha} and {self.beta}"
            option = "alpha" if self.alpha < 0 else "beta"
            raise OptionError(message, option=option, method=self.name, given=getattr(self, option))
        if self.start not in ("empty", "random"):
            raise OptionError.of("tip_adapter", "start", self.start, "'empty' or 'random'")

    @classmethod
    def examples(cls) -> tuple[TipAdapter, TipAdapter]:
        """With a random cache that is trained."""
        return cls(shots=2, train_keys=True, start="random"), cls(shots=3, beta=2.0, train_keys=True, start="random")

    def build(self, site: FeatureSite) -> TipAdapterAdapter:
        """An empty cache.

        Raises:
            ValueError: the head has no classes.
        """
        if not site.classes:
            message = "the head has no classes, so there are no logits to add votes to"
            raise OptionError(message, method=self.name, given=0, expected="classes")
        return TipAdapterAdapter(site, self)

    def count(self, site: FeatureSite) -> int:
        """shots·classes·width, if the keys are trained."""
        return self.shots * site.classes * site.width if self.train_keys else 0

    def prepare(
        self,
        adapters: Iterable[tuple[Site, Adapter]],
        run: Callable[[Tensor], Any],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        """Fills the caches.

        Raises:
            TipAdapterError: the number of images is not a multiple of `views`, their order changes, or they exceed the cache.
        """
        own = [adapter for _, adapter in adapters if isinstance(adapter, TipAdapterAdapter)]
        captured = [([a.capture_features(run, pixels) for a in own], labels) for pixels, labels in batches]
        every = torch.cat([labels for _, labels in captured]) if captured else torch.zeros(0, dtype=torch.long)
        if len(every) % self.views:
            message = (
                f"tip_adapter: {len(every)} images are not a multiple of views={self.views}. Repeat all images once per view."
            )
            raise TipAdapterError(message, where="views", given=len(every), expected=self.views)
        labels = every.unflatten(0, (self.views, -1))
        if (labels != labels[0]).any():
            raise TipAdapterError(
                f"tip_adapter: labels differ between the {self.views} views. Pass the images in the same order for each view.",
                where="labels",
                given="other labels",
                expected=self.views,
            )
        for i, adapter in enumerate(own):
            features = torch.cat([found[i] for found, _ in captured]) if captured else torch.zeros(0, adapter.keys.shape[-1])
            adapter.fill_cache(features.unflatten(0, (self.views, -1)).mean(0), labels[0].to(features.device))


class SearchResult(NamedTuple):
    """Result of `search`: α, β and the accuracy on the given images."""

    alpha: float
    beta: float
    accuracy: float


def grid(most: float, steps: int) -> list[float]:
    """From 0.1 up to below `most`, in even steps."""
    return [0.1 + i * (most - 0.1) / steps for i in range(steps)]


@torch.no_grad()
def search(
    adapter: TipAdapterAdapter,
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    betas: Sequence[float] = tuple(grid(7, 200)),
    alphas: Sequence[float] = tuple(grid(3, 20)),
) -> SearchResult:
    """The α and β with the best accuracy on held-out images; the first of equals, β before α. Changes nothing.

    Args:
        features: of the held-out images (n, width). `logits`: of the model without the adapter (n, classes). `labels`: (n,).
        betas, alphas: candidate values; by default the authors' for ImageNet.
    """
    affinities = normalize(features.to(adapter.keys), dim=-1) @ adapter.keys.flatten(0, 1).T
    best = SearchResult(adapter.alpha, adapter.beta, -1.0)
    for beta in betas:
        votes = adapter.votes(affinities, beta)
        for alpha in alphas:
            accuracy = ((logits + alpha * votes).argmax(-1) == labels).float().mean().item()
            if accuracy > best.accuracy:
                best = SearchResult(alpha, beta, accuracy)
    return best

"""Groups of pictures by what the frozen model makes of them: features that are overheard, and prototypes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection.errors import StateError


class Clusters(nn.Module):
    """`prototypes` (M, width), of which the first `found` count. Begins with one, so that all pictures are of one cluster.

    Attributes:
        place: path of the module that features enter or leave.
        listening: True while a picture runs through the model for its features alone; `heard` are they.
    """

    prototypes: Tensor
    found: Tensor

    def __init__(self, most: int, width: int, place: str = "") -> None:
        super().__init__()
        self.place = place
        self.register_buffer("prototypes", torch.zeros(most, width))
        self.register_buffer("found", torch.ones((), dtype=torch.long))
        self.listening = False
        self.heard: Tensor | None = None

    def features(self, run: Callable[[Tensor], Any], pictures: Tensor) -> Tensor:
        """(B, width) of pictures as they are, without a graph; in the prototypes' dtype.

        Raises:
            StateError: no features came by, because the adapters are off.
        """
        self.listening = True
        try:
            with torch.no_grad():
                run(pictures)
            heard = self.heard
        finally:
            self.listening, self.heard = False, None
        if heard is None:
            message = "dam_vp: no features came by. Switch the attachment on before prepare()."
            raise StateError(message, where="dam_vp", given="disabled")
        return heard.flatten(1).to(self.prototypes.dtype)

    def listen(self, features: Tensor) -> None:
        """Keep features that come by while `listening`, the first of a pass: other heads get the same."""
        if self.listening and self.heard is None:
            self.heard = features.detach()

    def nearest(self, features: Tensor) -> Tensor:
        """(B, width) to the number of the nearest prototype (B,), by Euclidean distance."""
        far = (features.unsqueeze(1) - self.prototypes).square().sum(-1)
        unused = torch.arange(len(self.prototypes), device=far.device) >= self.found
        return far.masked_fill(unused, torch.inf).argmin(1)

    def gather(self, features: Tensor, threshold: float) -> None:
        """Write prototypes: the means of agglomerative clusters, by average distance.

        Args:
            threshold: clusters farther apart than that stay apart; 0 for M clusters. Never more than M.
        """
        labels = grouped(features, len(self.prototypes), threshold)
        count = int(labels.max()) + 1
        self.prototypes.zero_()
        for i in range(count):
            self.prototypes[i] = features[labels == i].mean(0)
        self.found.fill_(count)


def grouped(features: Tensor, most: int, threshold: float) -> Tensor:
    """The cluster of each row (n,), numbered from 0."""
    from sklearn.cluster import AgglomerativeClustering

    rows = features.float().cpu().numpy()
    if len(rows) == 1:
        return torch.zeros(1, dtype=torch.long, device=features.device)
    labels = None
    if threshold > 0:
        labels = AgglomerativeClustering(n_clusters=None, linkage="average", distance_threshold=threshold).fit(rows).labels_
    if labels is None or labels.max() >= most:
        labels = AgglomerativeClustering(n_clusters=min(most, len(rows)), linkage="average").fit(rows).labels_
    return torch.from_numpy(labels).long().to(features.device)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside it, a model drops nothing out and moves no statistics."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

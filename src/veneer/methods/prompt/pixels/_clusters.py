"""Clusters of images by the frozen model's features, which are captured in a forward pass, and their prototypes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection.errors import StateError


class Clusters(nn.Module):
    """`prototypes` (M, width), of which the first `found` are valid. Initially one, so that all images are in one cluster.

    Attributes:
        place: path of the module that features enter or leave.
        capturing: True while the model runs only to capture an image's features; `captured` holds them.
    """

    prototypes: Tensor
    found: Tensor

    def __init__(self, most: int, width: int, place: str = "") -> None:
        super().__init__()
        self.place = place
        self.register_buffer("prototypes", torch.zeros(most, width))
        self.register_buffer("found", torch.ones((), dtype=torch.long))
        self.capturing = False
        self.captured: Tensor | None = None

    def features(self, run: Callable[[Tensor], Any], pictures: Tensor) -> Tensor:
        """(B, width) features of unmodified images, without a graph, in the prototypes' dtype.

        Raises:
            StateError: no features were captured, because the adapters are disabled.
        """
        self.capturing = True
        try:
            with torch.no_grad():
                run(pictures)
            captured = self.captured
        finally:
            self.capturing, self.captured = False, None
        if captured is None:
            message = "dam_vp: no features were captured. Enable the attachment before prepare()."
            raise StateError(message, where="dam_vp", given="disabled")
        return captured.flatten(1).to(self.prototypes.dtype)

    def capture(self, features: Tensor) -> None:
        """Captures the first features of a pass while `capturing`: other heads receive the same ones."""
        if self.capturing and self.captured is None:
            self.captured = features.detach()

    def nearest(self, features: Tensor) -> Tensor:
        """(B, width) to the index of the nearest prototype (B,), by Euclidean distance."""
        far = (features.unsqueeze(1) - self.prototypes).square().sum(-1)
        unused = torch.arange(len(self.prototypes), device=far.device) >= self.found
        return far.masked_fill(unused, torch.inf).argmin(1)

    def gather(self, features: Tensor, threshold: float) -> None:
        """Sets the prototypes to the means of agglomerative clusters with average linkage.

        Args:
            threshold: distance above which clusters are not merged; 0 for M clusters. Never more than M.
        """
        labels = cluster_labels(features, len(self.prototypes), threshold)
        count = int(labels.max()) + 1
        self.prototypes.zero_()
        for i in range(count):
            self.prototypes[i] = features[labels == i].mean(0)
        self.found.fill_(count)


def cluster_labels(features: Tensor, most: int, threshold: float) -> Tensor:
    """The cluster index of each row (n,), from 0."""
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
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches a model to evaluation mode: no dropout, no updates of running statistics."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

"""Features that are computed once: where only the head and what stands on features are trained, the backbone never runs again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment
from veneer.injection.sites import FeatureSite

from ..data.run_data import Views
from ..train.batches import Batch
from .classifier import Classifier
from .linear_probe_init import Head, solve_head

SPLITS = ("train", "validation", "test")


def reads_features_only(classifier: Classifier, attached: Sequence[Attachment]) -> bool:
    """True if nothing that is trained stands before the head."""
    site = classifier.features
    if site is None or not site.head:
        return False
    sites = [s for a in attached for s, _ in a.parts.values()]
    trained = [path for a in attached for _, path in a.extras.values()]
    return all(isinstance(s, FeatureSite) or _within(getattr(s, "path", None), site.head) for s in sites) and all(
        _within(path, site.head) for path in trained
    )


def _within(path: str | None, head: str) -> bool:
    return path is not None and (path == head or path.startswith(f"{head}."))


class Features:
    """What enters the head, for every picture of a run, in the eval view; and the head as a model of its own.

    Args:
        classifier: with the adapters on it, on their features only. `views`: of the run.
        batch: pictures a pass. `dtype`: of autocast, or None.
    """

    def __init__(self, classifier: Classifier, views: Views, batch: int, dtype: torch.dtype | None = None) -> None:
        self.views, self.classifier, self.batch, self.dtype = views, classifier, batch, dtype
        self._at: dict[int, int] = {}
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._first: Head | None = None

    @property
    def path(self) -> str:
        """Of the head in the model."""
        site = self.classifier.features
        assert site is not None
        return site.head

    @property
    def head(self) -> nn.Module:
        """The head as it is now."""
        return self.classifier.model.get_submodule(self.path)

    def first_head(self, classes: int) -> Head:
        """The logistic regression on them; the backbone runs with the adapters as they are now."""
        if self._first is None:
            self.see(("train", "validation"))
            splits = self.views.data.splits
            train, validation = (self([(0, index) for index in indices]) for indices in (splits.train, splits.validation))
            self._first = solve_head(train, validation, classes)
        return self._first

    def see(self, splits: Sequence[str] = SPLITS) -> None:
        """Run the backbone once over the pictures of some splits."""
        for split in splits:
            indices = [i for i in getattr(self.views.data.splits, split) if i not in self._at]
            for inputs, labels in self.views.plain.batches(indices, self.batch):
                self._rows.append(self._features(inputs))
                self._labels.append(labels)
            self._at |= {index: len(self._at) + place for place, index in enumerate(indices)}
        if self._rows:
            self._rows, self._labels = [torch.cat(self._rows)], [torch.cat(self._labels)]

    @torch.no_grad()
    def _features(self, inputs: Tensor) -> Tensor:
        found: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0].detach().float().cpu())

        device = next(self.classifier.model.parameters()).device
        handle = self.head.register_forward_pre_hook(keep, prepend=True)
        try:
            with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                self.classifier.model(inputs.to(device))
        finally:
            handle.remove()
        return found[0]

    def __call__(self, drawn: Sequence[tuple[int, int]]) -> Batch:
        """Features and labels of (epoch, picture) pairs."""
        places = torch.tensor([self._at[index] for _, index in drawn])
        return self._rows[0][places], self._labels[0][places]

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        """All pictures of a split, in order."""
        indices = getattr(self.views.data.splits, split)
        for start in range(0, len(indices), size):
            yield self([(0, index) for index in indices[start : start + size]])

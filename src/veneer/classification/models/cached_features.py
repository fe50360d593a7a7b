"""Feature cache: if only the head and adapters on features are trained, the backbone runs once per image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment
from veneer.injection.adapter_forms import ImagePromptAdapter
from veneer.injection.sites import FeatureSite

from ..data.run_data import Views
from ..train.batches import Batch
from .classifier import Classifier
from .linear_probe_init import Head, solve_head

SPLITS = ("train", "validation", "test")


def reads_features_only(classifier: Classifier, attached: Sequence[Attachment]) -> bool:
    """True if all adapters and trained parameters read and change the features or the head only, not tokens and the backbone."""
    site = classifier.features
    if site is None or not site.head:
        return False
    parts = [part for a in attached for part in a.parts.values()]
    if any(isinstance(adapter, ImagePromptAdapter) or adapter.input_port == "tokens" for _, adapter in parts):
        return False
    trained = [path for a in attached for _, path in a.extras.values()]
    return all(isinstance(s, FeatureSite) or _within(getattr(s, "path", None), site.head) for s, _ in parts) and all(
        _within(path, site.head) for path in trained
    )


def _within(path: str | None, head: str) -> bool:
    return path is not None and (path == head or path.startswith(f"{head}."))


class CachedFeatures:
    """Head inputs of every image of a run, under the evaluation transform, and the head as a separate module.

    Args:
        classifier: with adapters on its features only. `views`: of the run.
        batch: images per forward pass. `dtype`: of autocast, or None.
    """

    def __init__(self, classifier: Classifier, views: Views, batch: int, dtype: torch.dtype | None = None) -> None:
        self.views, self.classifier, self.batch, self.dtype = views, classifier, batch, dtype
        self._row_of: dict[int, int] = {}
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._probe: Head | None = None

    @property
    def path(self) -> str:
        """Path of the head in the model."""
        site = self.classifier.features
        assert site is not None
        return site.head

    @property
    def head(self) -> nn.Module:
        """The head."""
        return self.classifier.model.get_submodule(self.path)

    def linear_probe(self, classes: int) -> Head:
        """The logistic regression on the features, computed once, with the adapters in their current state."""
        if self._probe is None:
            self.compute(("train", "validation"))
            splits = self.views.data.splits
            train, validation = (self([(0, index) for index in indices]) for indices in (splits.train, splits.validation))
            self._probe = solve_head(train, validation, classes, self.views.data.objective)
        return self._probe

    def compute(self, splits: Sequence[str] = SPLITS) -> None:
        """Computes the features of splits that are not cached yet."""
        for split in splits:
            indices = [i for i in getattr(self.views.data.splits, split) if i not in self._row_of]
            for inputs, labels in self.views.plain.batches(indices, self.batch):
                self._features.append(self._compute_batch(inputs))
                self._labels.append(labels)
            self._row_of |= {index: len(self._row_of) + position for position, index in enumerate(indices)}
        if self._features:
            self._features, self._labels = [torch.cat(self._features)], [torch.cat(self._labels)]

    @torch.no_grad()
    def _compute_batch(self, inputs: Tensor) -> Tensor:
        features: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            features.append(args[0].detach().float().cpu())

        device = next(self.classifier.model.parameters()).device
        handle = self.head.register_forward_pre_hook(record, prepend=True)
        try:
            with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                self.classifier.model(inputs.to(device))
        finally:
            handle.remove()
        return features[0]

    def __call__(self, samples: Sequence[tuple[int, int]]) -> Batch:
        """Features and labels of (epoch, index) pairs."""
        rows = torch.tensor([self._row_of[index] for _, index in samples])
        return self._features[0][rows], self._labels[0][rows]

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        """Features and labels of a split, in order."""
        indices = getattr(self.views.data.splits, split)
        for start in range(0, len(indices), size):
            yield self([(0, index) for index in indices[start : start + size]])

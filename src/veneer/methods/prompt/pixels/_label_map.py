"""Maps labels of a frozen head to new classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection.errors import HostChanged, OptionError, StateError
from veneer.injection.method import Adapter
from veneer.injection.sites import FeatureSite, Site


class SelectedColumns(Adapter):
    """Replaces the logits by selected columns: `index` (n,), saved. If n is not the number of logits, it is either on or off.

    Args:
        site: where logits leave the head. `options`: number of available columns. `classes`: n; 0 for `site.classes`.
    """

    applies_strength: ClassVar[bool] = True
    index: Tensor

    def __init__(self, site: FeatureSite, options: int, classes: int) -> None:
        super().__init__()
        count = classes or site.classes
        if count > options:
            message = f"{count} classes need as many distinct columns, but there are {options}; set classes lower"
            raise OptionError(message, option="classes", given=count, expected=options)
        self.place, self.options = site.name, options
        self.changes_shape = count != site.classes
        self.register_buffer("index", torch.arange(count))

    def select(self, columns: Tensor, y: Tensor) -> Tensor:
        """columns (B, `options`, …) at `index`, blended with the logits y if the number is the same."""
        if columns.shape[1] != self.options:
            raise HostChanged(
                f"{self.place}: got {columns.shape[1]} columns; the label map expects {self.options}. Another label map is on "
                "this head, or the head was replaced: detach and attach again.",
                where=self.place,
                given=columns.shape[1],
                expected=self.options,
            )
        after = columns.index_select(1, self.index).to(y.dtype)
        return after if self.changes_shape else torch.lerp(y, after.view_as(y), self.strength.to(y.dtype))


class LabelMap(SelectedColumns):
    """y'[:, j] = y[:, index[j]]: the logit of the source label assigned to class j.

    Attributes:
        seen: the head's predicted source labels while images are counted; else None.
    """

    def __init__(self, site: FeatureSite, classes: int) -> None:
        super().__init__(site, site.classes, classes)
        self.seen: list[Tensor] | None = None

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: logits (B, K). Returns (B, n)."""
        if self.seen is not None:
            self.seen.append(y.detach().flatten(1).argmax(1))
        return self.select(y, y)


def fit_label_maps(
    adapters: Iterable[tuple[Site, Adapter]],
    run: Callable[[Tensor], Any],
    batches: Iterable[tuple[Tensor, Tensor]],
    assign: Callable[[Tensor], Tensor],
) -> None:
    """Sets every map's `index`, from how often each source label is predicted for each class.

    Args:
        assign: maps counts (source labels, classes) to one source label per class.
    Raises:
        StateError: the adapters are disabled. ValueError: a label outside the classes, or no images.
    """
    maps = [adapter for _, adapter in adapters if isinstance(adapter, LabelMap)]
    if not maps:
        return
    counts = [torch.zeros(m.options, len(m.index), dtype=torch.long) for m in maps]
    for pictures, labels in batches:
        for count, m, answers in zip(counts, maps, _predict(maps, run, pictures), strict=True):
            _count_predictions(count, answers.cpu(), labels.cpu().long(), m.place)
    for count, m in zip(counts, maps, strict=True):
        if not count.any():
            message = f"{m.place}: no images to assign source labels with; pass labeled images"
            raise OptionError(message, option="batches", method="prepare", where=m.place, given=0)
        m.index.copy_(assign(count))


def _predict(maps: list[LabelMap], run: Callable[[Tensor], Any], pictures: Tensor) -> list[Tensor]:
    """The source labels that each head predicts."""
    for m in maps:
        m.seen = []
    try:
        run(pictures)
        unseen = next((m.place for m in maps if not m.seen), None)
        if unseen is not None:
            message = f"{unseen}: the label map received no logits. Enable the attachment before prepare()."
            raise StateError(message, where=unseen, given="disabled")
        return [torch.cat(m.seen or []) for m in maps]
    finally:
        for m in maps:
            m.seen = None


def _count_predictions(count: Tensor, answers: Tensor, labels: Tensor, place: str) -> None:
    classes = count.shape[1]
    if len(answers) != len(labels):
        message = f"{place}: {len(labels)} labels for {len(answers)} predictions; pass one label per image"
        raise OptionError(message, option="labels", method="prepare", where=place, given=len(labels), expected=len(answers))
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        problem = f"labels are {int(labels.min())} to {int(labels.max())}, but the label map has classes 0 to {classes - 1}"
        label_range = (int(labels.min()), int(labels.max()))
        raise OptionError(
            f"{place}: {problem}; set classes",
            option="classes",
            method="prepare",
            where=place,
            given=label_range,
            expected=classes,
        )
    count += torch.bincount(answers * classes + labels, minlength=count.numel()).view_as(count)


def most_frequent(counts: Tensor) -> Tensor:
    """For each class the most frequently predicted source label, the smaller one on ties; classes may share a label."""
    return counts.argmax(0)


def one_to_one(counts: Tensor) -> Tensor:
    """For each class a distinct source label, greedily: the most frequent pair is assigned and both are removed, and so on.

    Ties go to the smaller source label, then the smaller class. Needs at most as many classes as
    source labels.
    """
    sources, classes = counts.shape
    pairs = counts.nonzero()  # sorted by source label, then class
    order = counts[pairs[:, 0], pairs[:, 1]].sort(descending=True, stable=True).indices
    assigned: dict[int, int] = {}
    used: set[int] = set()
    for source, target in pairs[order].tolist():
        if target not in assigned and source not in used:
            assigned[target] = source
            used.add(source)
    free = (source for source in range(sources) if source not in used)
    return torch.tensor([assigned[t] if t in assigned else next(free) for t in range(classes)])

"""A frozen head's labels for new classes: which source label stands for which class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection.errors import HostChanged, OptionError, StateError
from veneer.injection.method import Adapter
from veneer.injection.sites import FeatureSite, Site


class Chosen(Adapter):
    """Some columns in the place of the logits: `index` (n,), saved. With n other than the logits' number it is on or off.

    Args:
        site: where logits leave the head. `options`: columns that there are to choose from. `classes`: n; 0 for `site.classes`.
    """

    blends: ClassVar[bool] = True
    index: Tensor

    def __init__(self, site: FeatureSite, options: int, classes: int) -> None:
        super().__init__()
        count = classes or site.classes
        if count > options:
            message = f"{count} classes need as many different columns, and there are {options}; set classes lower"
            raise OptionError(message, option="classes", given=count, expected=options)
        self.place, self.options = site.name, options
        self.switches = count != site.classes
        self.register_buffer("index", torch.arange(count))

    def chosen(self, columns: Tensor, y: Tensor) -> Tensor:
        """columns (B, `options`, …) at `index`, blended with the logits y where there are as many."""
        if columns.shape[1] != self.options:
            raise HostChanged(
                f"{self.place}: {columns.shape[1]} columns came, and the map is for {self.options}. Another map is on "
                "this head, or it was made anew: detach and attach again.",
                where=self.place,
                given=columns.shape[1],
                expected=self.options,
            )
        after = columns.index_select(1, self.index).to(y.dtype)
        return after if self.switches else torch.lerp(y, after.view_as(y), self.strength.to(y.dtype))


class LabelMap(Chosen):
    """y'[:, j] = y[:, index[j]]: the logit of the source label that stands for class j.

    Attributes:
        seen: while pictures are counted, the source labels that the head answers; else None.
    """

    def __init__(self, site: FeatureSite, classes: int) -> None:
        super().__init__(site, site.classes, classes)
        self.seen: list[Tensor] | None = None

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: logits (B, K). Gives (B, n)."""
        if self.seen is not None:
            self.seen.append(y.detach().flatten(1).argmax(1))
        return self.chosen(y, y)


def fill(
    adapters: Iterable[tuple[Site, Adapter]],
    run: Callable[[Tensor], Any],
    batches: Iterable[tuple[Tensor, Tensor]],
    assign: Callable[[Tensor], Tensor],
) -> None:
    """Write every map's `index`, from how often each source label is answered for each class.

    Args:
        assign: counts (source labels, classes) to source labels, one a class.
    Raises:
        StateError: the adapters are off. ValueError: a label that is none of the classes, or no pictures.
    """
    maps = [adapter for _, adapter in adapters if isinstance(adapter, LabelMap)]
    if not maps:
        return
    counts = [torch.zeros(m.options, len(m.index), dtype=torch.long) for m in maps]
    for pictures, labels in batches:
        for count, m, answers in zip(counts, maps, _answers(maps, run, pictures), strict=True):
            _add(count, answers.cpu(), labels.cpu().long(), m.place)
    for count, m in zip(counts, maps, strict=True):
        if not count.any():
            message = f"{m.place}: no pictures came to choose source labels by; give labelled ones"
            raise OptionError(message, option="batches", method="prepare", where=m.place, given=0)
        m.index.copy_(assign(count))


def _answers(maps: list[LabelMap], run: Callable[[Tensor], Any], pictures: Tensor) -> list[Tensor]:
    """The source labels that each head answers."""
    for m in maps:
        m.seen = []
    try:
        run(pictures)
        unseen = next((m.place for m in maps if not m.seen), None)
        if unseen is not None:
            message = f"{unseen}: the map saw no logits. Switch the attachment on before prepare()."
            raise StateError(message, where=unseen, given="disabled")
        return [torch.cat(m.seen or []) for m in maps]
    finally:
        for m in maps:
            m.seen = None


def _add(count: Tensor, answers: Tensor, labels: Tensor, place: str) -> None:
    classes = count.shape[1]
    if len(answers) != len(labels):
        message = f"{place}: {len(labels)} labels for {len(answers)} answers; give one label a picture"
        raise OptionError(message, option="labels", method="prepare", where=place, given=len(labels), expected=len(answers))
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        told = f"labels are {int(labels.min())} to {int(labels.max())}, and the map has classes 0 to {classes - 1}"
        given = (int(labels.min()), int(labels.max()))
        raise OptionError(
            f"{place}: {told}; set classes", option="classes", method="prepare", where=place, given=given, expected=classes
        )
    count += torch.bincount(answers * classes + labels, minlength=count.numel()).view_as(count)


def most_frequent(counts: Tensor) -> Tensor:
    """For each class the source label that is answered most, the smaller of two; several classes may have one."""
    return counts.argmax(0)


def one_to_one(counts: Tensor) -> Tensor:
    """For each class a source label of its own: the pair that is counted most is taken, both leave, and so on.

    Of pairs that are counted as often, the one with the smaller source label, then the smaller class. At most as many classes as
    source labels.
    """
    sources, classes = counts.shape
    pairs = counts.nonzero()  # by source label, then class
    order = counts[pairs[:, 0], pairs[:, 1]].sort(descending=True, stable=True).indices
    taken: dict[int, int] = {}
    used: set[int] = set()
    for source, target in pairs[order].tolist():
        if target not in taken and source not in used:
            taken[target] = source
            used.add(source)
    free = (source for source in range(sources) if source not in used)
    return torch.tensor([taken[t] if t in taken else next(free) for t in range(classes)])

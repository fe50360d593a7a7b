"""The contract of a LyCORIS codec: converts the tensors of one module to adapters of one method, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.injection import LoadError, SaveError
from veneer.injection.sites import WeightSite

from .._io.reader import File
from .._names.kohya import NamedLayer

Spans = list[tuple[int, int]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LycorisModule:
    """One module of a file.

    Args:
        name: in the file. `place`: its rows in the model. `parts`: its tensors by key suffix.
        towers: component -> model. `notes`: remarks for the load report.
    """

    file: File
    name: str
    place: NamedLayer
    parts: Mapping[str, Tensor]
    towers: Mapping[str, nn.Module]
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Total number of outputs of its sites."""
        return sum(site.d_out for site in self.place.sites)

    @property
    def first(self) -> WeightSite:
        """Its first site; all sites have the same inputs."""
        return self.place.sites[0]

    def expect(self, right: bool, expected: str) -> None:
        """Raises with the shapes of all tensors unless `right`.

        Raises:
            LoadError: names the shapes expected for this base.
        """
        if not right:
            shapes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in self.parts.items())
            weight = (self.rows, *self.first.weight_shape[1:])
            raise LoadError(
                f"{self.file.path}: misshapen: '{self.name}' has {shapes} for a weight {weight}; expected {expected}. It was "
                "made for another base model, or is corrupt.",
                file=self.file.path,
                where=self.name,
                given={part: tuple(t.shape) for part, t in self.parts.items()},
                expected=expected,
            )

    def error(self, why: str, **data: Any) -> LoadError:
        """The error that this module makes the file unloadable. `data`: attributes of the error."""
        message = f"{self.file.path}: '{self.name}' {why}, so nothing was loaded."
        return LoadError(message, file=self.file.path, where=self.name, **data)


@dataclass(frozen=True)
class SiteTensors:
    """A module's content at one site: options of the method, and the adapter's tensors by name."""

    site: WeightSite
    options: Mapping[str, Any]
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterGroup:
    """The adapters of one layer, written as one module.

    Args:
        adapters: by site name, not empty. `towers`: component -> model.
    """

    place: NamedLayer
    adapters: Mapping[str, Any]
    towers: Mapping[str, nn.Module]

    @property
    def site(self) -> WeightSite:
        """Its first site; all sites have the same inputs."""
        return self.place.sites[0]

    @property
    def ones(self) -> tuple[int, ...]:
        """Singleton spatial dimensions of a 1×1 kernel."""
        return (1,) * len(self.site.kernel)

    def error(self, why: str, **data: Any) -> SaveError:
        """The error that the format cannot hold these adapters. `data`: attributes of the error."""
        name = next(iter(self.adapters))
        return SaveError(f"'{name}' {why}. Save it with Attachment.save (native format).", where=name, **data)


class Codec(ABC):
    """One method in the LyCORIS format.

    Class attributes:
        method: veneer's name. `algo`: LyCORIS' name.
        suffixes: key suffixes of its tensors, without the module's name and a dot.
        groups: True if grouped convolutions have the same semantics in veneer and LyCORIS.
    """

    method: ClassVar[str]
    algo: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    groups: ClassVar[bool] = False

    @abstractmethod
    def matches(self, shapes: Shapes) -> bool:
        """True if tensors with these suffixes and shapes belong to this method."""

    def rank(self, shapes: Shapes) -> int | None:
        """The rank that alpha is divided by, if the shapes determine it."""
        return None

    @abstractmethod
    def read(self, module: LycorisModule) -> list[SiteTensors]:
        """The same weight update at every site.

        Raises:
            LoadError: shapes are wrong, or the method cannot represent the module.
        """

    @abstractmethod
    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        """The tensors of one module, by key suffix.

        Raises:
            SaveError: the format cannot hold these adapters.
        """

    def config(self, pieces: Sequence[SiteTensors]) -> dict[str, Any]:
        """Options of one attachment at all these sites: the most common value of each, and exceptions by site.

        An option that a piece does not set is not counted for it.
        """
        names = dict.fromkeys(name for piece in pieces for name in piece.options)
        common = {n: Counter(p.options[n] for p in pieces if n in p.options).most_common(1)[0][0] for n in names}
        own = {p.site.name: {n: v for n, v in p.options.items() if v != common[n]} for p in pieces}
        return {**common, "by_site": {f"name:{name}": options for name, options in own.items() if options}}

    def args(self, group: AdapterGroup) -> dict[str, str]:
        """Arguments besides `algo` that LyCORIS needs to build such modules."""
        return {}


def has_row_order(factor: Tensor, inner: Sequence[int] = ()) -> bool:
    """True if the rows of a factor are stored flat or as `inner`, such as (channels, *kernel), with optional trailing ones.

    Other dimensions with the same number of elements would imply another order.
    """
    return len(rest := _strip_ones(factor.shape[1:])) <= 1 or rest == _strip_ones(inner)


def _strip_ones(sides: Sequence[int]) -> list[int]:
    found = list(sides)
    while len(found) > 1 and found[-1] == 1:
        found.pop()
    return found


def spans(place: NamedLayer) -> dict[str, Spans]:
    """(start, stop) of the rows of a layer's tensor that belong to each site, in order: one span, or two swapped halves."""
    found: dict[str, Spans] = {}
    start = 0
    for site in place.sites:
        stop, half = start + site.d_out, start + site.d_out // 2
        found[site.name] = [(half, stop), (start, half)] if place.swapped else [(start, stop)]
        start = stop
    return found


def take(tensor: Tensor, rows: Spans, side: int = 1, dim: int = 0) -> Tensor:
    """The given rows, in order. `side`: rows per entry of the tensor; must divide all spans."""
    if len(rows) == 1 and rows[0] == (0, tensor.shape[dim] * side):
        return tensor
    return torch.cat([tensor.narrow(dim, start // side, (stop - start) // side) for start, stop in rows], dim)


def put(place: NamedLayer, parts: Mapping[str, Tensor], side: int = 1, dim: int = 0) -> Tensor:
    """The inverse of `take`: puts each site's rows at their position in the layer's tensor. All sites must be present."""
    placed: list[Tensor] = []
    for site in place.sites:
        halves = parts[site.name].chunk(2, dim) if place.swapped else (parts[site.name],)
        placed += reversed(halves)
    return torch.cat(placed, dim) if len(placed) > 1 else placed[0]


def is_aligned(rows: Spans, side: int) -> bool:
    """True if all spans are multiples of `side` rows."""
    return all(start % side == 0 and stop % side == 0 for start, stop in rows)

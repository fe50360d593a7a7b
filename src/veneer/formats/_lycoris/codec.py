"""What a codec of LyCORIS' layout is: the tensors of one module into adapters of one method, and back."""

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
from .._names.kohya import Place

Spans = list[tuple[int, int]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Module:
    """One module of a file.

    Args:
        name: in the file. `place`: its rows in the model. `parts`: its tensors by the ends of their keys.
        towers: component to model. `notes`: remarks on what was read, for the report.
    """

    file: File
    name: str
    place: Place
    parts: Mapping[str, Tensor]
    towers: Mapping[str, nn.Module]
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many outputs all its sites have."""
        return sum(site.d_out for site in self.place.sites)

    @property
    def first(self) -> WeightSite:
        """Its first site: all have the same inputs."""
        return self.place.sites[0]

    def expect(self, right: bool, wanted: str) -> None:
        """Raise with the shapes of all tensors unless they are `right`.

        Raises:
            LoadError: says what was wanted for this base.
        """
        if not right:
            shapes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in self.parts.items())
            weight = (self.rows, *self.first.weight_shape[1:])
            raise LoadError(
                f"{self.file.path}: misshapen: '{self.name}' has {shapes} for a weight {weight}; expected {wanted}. It was made "
                "for another base, or it is damaged.",
                file=self.file.path,
                where=self.name,
                given={part: tuple(t.shape) for part, t in self.parts.items()},
                expected=wanted,
            )

    def refuse(self, why: str, **data: Any) -> LoadError:
        """The error that nothing of the file is loaded, because of this module. `data`: attributes of the error."""
        message = f"{self.file.path}: '{self.name}' {why}, so nothing is loaded."
        return LoadError(message, file=self.file.path, where=self.name, **data)


@dataclass(frozen=True)
class Piece:
    """What a module means at one site: options of the method there, and the adapter's tensors by name."""

    site: WeightSite
    options: Mapping[str, Any]
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """The adapters of one place that are written as one module.

    Args:
        adapters: by site name, not empty. `towers`: component to model.
    """

    place: Place
    adapters: Mapping[str, Any]
    towers: Mapping[str, nn.Module]

    @property
    def site(self) -> WeightSite:
        """Its first site: all have the same inputs."""
        return self.place.sites[0]

    @property
    def ones(self) -> tuple[int, ...]:
        """What follows the channels of a kernel of one pixel."""
        return (1,) * len(self.site.kernel)

    def refuse(self, why: str, **data: Any) -> SaveError:
        """The error that the layout cannot hold these adapters. `data`: attributes of the error."""
        name = next(iter(self.adapters))
        return SaveError(f"'{name}' {why}. The native file (Attachment.save) holds it.", where=name, **data)


class Codec(ABC):
    """One method in LyCORIS' layout.

    Class attributes:
        method: veneer's name of it. `algo`: LyCORIS' name of it.
        ends: how the keys of its tensors end, without the module's name and a dot.
        groups: True if a grouped convolution is the same function here and there.
    """

    method: ClassVar[str]
    algo: ClassVar[str]
    ends: ClassVar[tuple[str, ...]]
    groups: ClassVar[bool] = False

    @abstractmethod
    def mine(self, shapes: Shapes) -> bool:
        """True if tensors of these ends and shapes are of this method."""

    def rank(self, shapes: Shapes) -> int | None:
        """The rank that alpha belongs to, as far as shapes tell."""
        return None

    @abstractmethod
    def read(self, module: Module) -> list[Piece]:
        """The same change of every site.

        Raises:
            LoadError: tensors do not fit, or the method cannot hold what they mean.
        """

    @abstractmethod
    def write(self, group: Group) -> dict[str, Tensor]:
        """The tensors of one module, by the ends of their keys.

        Raises:
            SaveError: the layout cannot hold these adapters.
        """

    def config(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Options of one attachment at all these sites: of each the commonest value, and others by site.

        An option that a piece does not name does not count there.
        """
        names = dict.fromkeys(name for piece in pieces for name in piece.options)
        common = {n: Counter(p.options[n] for p in pieces if n in p.options).most_common(1)[0][0] for n in names}
        own = {p.site.name: {n: v for n, v in p.options.items() if v != common[n]} for p in pieces}
        return {**common, "by_site": {f"name:{name}": options for name, options in own.items() if options}}

    def args(self, group: Group) -> dict[str, str]:
        """What LyCORIS must be told to build such modules, beside `algo`."""
        return {}


def straight(factor: Tensor, inner: Sequence[int] = ()) -> bool:
    """True if the rows of a factor are written as one side or as `inner`, such as (channels, *kernel); ones may follow.

    Other sides of as many numbers would hold them in another order.
    """
    return len(rest := _stripped(factor.shape[1:])) <= 1 or rest == _stripped(inner)


def _stripped(sides: Sequence[int]) -> list[int]:
    found = list(sides)
    while len(found) > 1 and found[-1] == 1:
        found.pop()
    return found


def spans(place: Place) -> dict[str, Spans]:
    """(start, stop) of the rows of a place's tensor that each site has, in the site's order: one span, or two swapped halves."""
    found: dict[str, Spans] = {}
    start = 0
    for site in place.sites:
        stop, half = start + site.d_out, start + site.d_out // 2
        found[site.name] = [(half, stop), (start, half)] if place.swapped else [(start, stop)]
        start = stop
    return found


def take(tensor: Tensor, rows: Spans, side: int = 1, dim: int = 0) -> Tensor:
    """These rows, in this order. `side`: how many rows one entry of the tensor stands for; it must divide all of them."""
    if len(rows) == 1 and rows[0] == (0, tensor.shape[dim] * side):
        return tensor
    return torch.cat([tensor.narrow(dim, start // side, (stop - start) // side) for start, stop in rows], dim)


def put(place: Place, parts: Mapping[str, Tensor], side: int = 1, dim: int = 0) -> Tensor:
    """The inverse of `take`: each site's rows to where they are in the place's tensor. All sites must be there."""
    placed: list[Tensor] = []
    for site in place.sites:
        halves = parts[site.name].chunk(2, dim) if place.swapped else (parts[site.name],)
        placed += reversed(halves)
    return torch.cat(placed, dim) if len(placed) > 1 else placed[0]


def aligned(rows: Spans, side: int) -> bool:
    """True if all spans are whole blocks of `side` rows."""
    return all(start % side == 0 and stop % side == 0 for start, stop in rows)

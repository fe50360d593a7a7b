"""What a codec of peft's layout is: the tensors of one module into adapters of one method, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.sites import ParamSite, WeightSite

from .._io.reader import File
from .._lycoris.codec import Codec, Group, Module, Piece
from .._names.kohya import Place
from .config import scaled_alpha

Settings = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One module of a file.

    Args:
        path: of the module. `site`: its weight. `biases`: the sites of its bias, row by row.
        parts: tensors by the ends of their keys. `shared`: tensors of the whole file. `config`: peft's.
        towers: component to model. `notes`: remarks for the report.
    """

    file: File
    path: str
    site: WeightSite
    biases: Sequence[ParamSite]
    parts: Mapping[str, Tensor]
    config: Mapping[str, Any]
    towers: Mapping[str, nn.Module]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_module(self, parts: Mapping[str, Tensor]) -> Module:
        """The same with other parts, for a codec of LyCORIS' layout, where the two are alike."""
        return Module(self.file, self.path, Place((self.path,), (self.site,)), parts, self.towers, self.notes)

    def expect(self, right: bool, wanted: str, **data: Any) -> None:
        """Raise with the shapes of all tensors unless they are `right`. `data`: other attributes of the error."""
        if not right:
            shapes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in self.parts.items())
            given = {part: tuple(t.shape) for part, t in self.parts.items()}
            attributes: dict[str, Any] = {"file": self.file.path, "where": self.path, "given": given, "expected": wanted, **data}
            raise LoadError(
                f"{self.file.path}: misshapen: '{self.path}' has {shapes} for a weight {self.site.weight_shape}; expected "
                f"{wanted}. It was made for another base, or it is damaged.",
                **attributes,
            )

    def refuse(self, why: str, **data: Any) -> LoadError:
        """The error that nothing of the file is loaded, because of this module. `data`: attributes of the error."""
        message = f"{self.file.path}: '{self.path}' {why}, so nothing is loaded."
        return LoadError(message, file=self.file.path, where=self.path, **data)


@dataclass(frozen=True)
class Part:
    """One adapter of an attachment that is written: its module's path, site and adapter."""

    path: str
    site: Any
    adapter: Any
    towers: Mapping[str, nn.Module]

    def group(self) -> Group:
        """The same, for a codec of LyCORIS' layout."""
        return Group(Place((self.path,), (self.site,)), {self.site.name: self.adapter}, self.towers)

    def refuse(self, why: str, **data: Any) -> SaveError:
        """The error that the layout cannot hold it. `data`: attributes of the error."""
        name = self.site.name
        return SaveError(f"'{name}' {why}. The native file (Attachment.save) holds it.", where=name, **data)


class PeftCodec(ABC):
    """One method in peft's layout.

    Class attributes:
        kind: peft's name of it, its `peft_type`. `method`: veneer's.
        ends: how the keys of a module's tensors end. `shared`: keys of tensors of the whole file.
    """

    kind: ClassVar[str]
    method: ClassVar[str]
    ends: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def read(self, layer: Layer) -> list[Piece]:
        """The same change of the site (and of its bias).

        Raises:
            LoadError: tensors do not fit, or the method cannot hold what they mean.
        """

    @abstractmethod
    def write(self, part: Part) -> dict[str, Tensor]:
        """The tensors of one module, by the ends of their keys.

        Raises:
            SaveError: the layout cannot hold this adapter.
        """

    @abstractmethod
    def settings(self, attachment: Attachment, parts: Sequence[Part]) -> Settings:
        """The entries of peft's config from which it builds the same modules.

        Raises:
            SaveError: there are none.
        """

    def config(self, pieces: Sequence[Piece]) -> Settings:
        """Options of veneer's method at all these sites: of each the commonest value, and others by site."""
        return Codec.config(self, pieces)  # type: ignore[arg-type]

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The rank, as far as shapes tell."""
        return None

    def alpha(self, file: File, config: Settings, path: str, rank: int) -> float | None:
        """The alpha of a module in peft's config, None if it has none."""
        key = "lora_alpha" if self.kind == "LORA" else "alpha"
        return scaled_alpha(file, config, path, rank, key) if key in config else None

    def whole(self, attachment: Attachment) -> dict[str, Tensor]:
        """Tensors of the whole file, by key."""
        return {}


def same(parts: Sequence[Part], what: str, values: Mapping[str, Any]) -> Any:
    """The one value that all modules have.

    Raises:
        SaveError: they have several, which peft's config has no place for.
    """
    found = list(dict.fromkeys(values.values()))
    if len(found) > 1:
        other = next(path for path, value in values.items() if value != found[0])
        part = next(p for p in parts if p.path == other)
        why = f"has {what} {values[other]} and others {found[0]}, of which peft's config has one for all"
        raise part.refuse(why, given=values[other], expected=found[0])
    return found[0]

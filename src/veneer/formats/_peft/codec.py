"""The contract of a peft codec: converts the tensors of one module to adapters of one method, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.sites import ParamSite, WeightSite

from .._io.reader import File
from .._lycoris.codec import AdapterGroup, Codec, LycorisModule, SiteTensors
from .._names.kohya import NamedLayer
from .config import scaled_alpha

Settings = dict[str, Any]


@dataclass(frozen=True)
class PeftModule:
    """One module of a file.

    Args:
        path: of the module. `site`: its weight. `biases`: the sites of its bias, row by row.
        parts: tensors by key suffix. `shared`: tensors of the whole file. `config`: peft's.
        towers: component -> model. `notes`: remarks for the load report.
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

    def as_module(self, parts: Mapping[str, Tensor]) -> LycorisModule:
        """The module with other parts, for a LyCORIS codec, where both formats agree."""
        return LycorisModule(self.file, self.path, NamedLayer((self.path,), (self.site,)), parts, self.towers, self.notes)

    def expect(self, right: bool, expected: str, **data: Any) -> None:
        """Raises with the shapes of all tensors unless `right`. `data`: other attributes of the error."""
        if not right:
            shapes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in self.parts.items())
            found = {part: tuple(t.shape) for part, t in self.parts.items()}
            attributes: dict[str, Any] = {
                "file": self.file.path,
                "where": self.path,
                "given": found,
                "expected": expected,
                **data,
            }
            raise LoadError(
                f"{self.file.path}: misshapen: '{self.path}' has {shapes} for a weight {self.site.weight_shape}; expected "
                f"{expected}. It was made for another base model, or is corrupt.",
                **attributes,
            )

    def error(self, why: str, **data: Any) -> LoadError:
        """The error that this module makes the file unloadable. `data`: attributes of the error."""
        message = f"{self.file.path}: '{self.path}' {why}, so nothing was loaded."
        return LoadError(message, file=self.file.path, where=self.path, **data)


@dataclass(frozen=True)
class PeftAdapter:
    """One adapter to be written: its module's path, site and adapter."""

    path: str
    site: Any
    adapter: Any
    towers: Mapping[str, nn.Module]

    def group(self) -> AdapterGroup:
        """The adapter as a group, for a LyCORIS codec."""
        return AdapterGroup(NamedLayer((self.path,), (self.site,)), {self.site.name: self.adapter}, self.towers)

    def error(self, why: str, **data: Any) -> SaveError:
        """The error that the format cannot hold it. `data`: attributes of the error."""
        name = self.site.name
        return SaveError(f"'{name}' {why}. Save it with Attachment.save (native format).", where=name, **data)


class PeftCodec(ABC):
    """One method in peft's format.

    Class attributes:
        kind: peft's name, its `peft_type`. `method`: veneer's name.
        suffixes: key suffixes of a module's tensors. `shared`: keys of tensors of the whole file.
    """

    kind: ClassVar[str]
    method: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def read(self, layer: PeftModule) -> list[SiteTensors]:
        """The same update of the site (and of its bias).

        Raises:
            LoadError: shapes are wrong, or the method cannot represent the module.
        """

    @abstractmethod
    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        """The tensors of one module, by key suffix.

        Raises:
            SaveError: the format cannot hold this adapter.
        """

    @abstractmethod
    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        """The entries of peft's config that rebuild the same modules.

        Raises:
            SaveError: peft's config cannot express them.
        """

    def config(self, pieces: Sequence[SiteTensors]) -> Settings:
        """Options of veneer's method at all these sites: the most common value of each, and exceptions by site."""
        return Codec.config(self, pieces)  # type: ignore[arg-type]

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The rank, if the shapes determine it."""
        return None

    def alpha(self, file: File, config: Settings, path: str, rank: int) -> float | None:
        """The alpha of a module in peft's config, None if it has none."""
        key = "lora_alpha" if self.kind == "LORA" else "alpha"
        return scaled_alpha(file, config, path, rank, key) if key in config else None

    def whole(self, attachment: Attachment) -> dict[str, Tensor]:
        """Tensors of the whole file, by key."""
        return {}


def shared_value(parts: Sequence[PeftAdapter], what: str, values: Mapping[str, Any]) -> Any:
    """The value shared by all modules.

    Raises:
        SaveError: the values differ, but peft's config has a single one.
    """
    found = list(dict.fromkeys(values.values()))
    if len(found) > 1:
        other = next(path for path, value in values.items() if value != found[0])
        part = next(p for p in parts if p.path == other)
        why = f"has {what} {values[other]} and others have {found[0]}, but peft's config has a single value"
        raise part.error(why, given=values[other], expected=found[0])
    return found[0]

"""Formats that differ only in the names of layers and tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection import Attachment
from veneer.injection.towers import Tower, towers_of

from .._io.model_spec import HASHES, model_spec
from .._io.reader import File
from .._io.writer import write
from .._names.kohya import NamedLayer
from .._names.kohya_fused import LoRAFactors
from .attach import attach_all
from .format import Format, LayerInfo, Options, pt_metadata
from .lora_reader import KOHYA, layers_of, lora_spec
from .lora_writer import LayerTensors, layers_to_write


class LayerTableFormat(Format):
    """A LoRA format described by a table of layer names.

    Class attributes:
        suffixes: key suffix -> kind of tensor (`lora_reader.PARTS`). `files`: plural name of its files, for error messages.
        implementation: whose names the tensors have, for `model_spec`; None for a format whose tools read no such metadata.
    """

    order: ClassVar[int] = 0
    suffixes: ClassVar[Mapping[str, str]] = KOHYA
    files: ClassVar[str]
    implementation: ClassVar[str | None] = None

    @abstractmethod
    def places(self, tower: Tower) -> Sequence[NamedLayer]:
        """The layers of a tower under the names that are written; empty if the format has no names for it."""

    def readable(self, tower: Tower) -> Iterable[NamedLayer]:
        """The layers of a tower under all names that are recognized when reading."""
        return self.places(tower)

    def layers(self, file: File) -> list[LayerInfo]:
        return layers_of(file, self.suffixes)

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        return attach_all(model, file, [lora_spec(model, file, options, self.known(model), self.suffixes)], options)

    def known(self, model: Any) -> dict[str, NamedLayer]:
        """The layers of a model or pipeline by every recognized name."""
        return {name: place for tower in towers_of(model) for place in self.readable(tower) for name in place.names}

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        tensors = LayerTensors(layers_to_write(attachments, target, self.places, self.files), self.tensors)
        if self.implementation is None:
            return write(target, tensors, pt_metadata(provenance))
        metadata = model_spec(attachments, provenance, self.implementation)
        return write(target, tensors, pt_metadata(provenance, metadata), HASHES)

    def tensors(self, pair: LoRAFactors) -> dict[str, Tensor]:
        """The tensors of a layer by key suffix."""
        return kohya_tensors(pair)


def kohya_tensors(pair: LoRAFactors) -> dict[str, Tensor]:
    """The tensors of a layer by kohya's key suffixes."""
    down, up, scaling = pair
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(scaling * down.shape[0])}

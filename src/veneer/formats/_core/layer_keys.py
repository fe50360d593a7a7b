"""Formats that name layers and the tensors of a layer, and differ in nothing but these names."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection import Attachment
from veneer.injection.towers import Tower, towers_of

from .._io.reader import File
from .._io.writer import destination, write
from .._names.kohya import Place
from .._names.kohya_fused import Pair
from .attach import attach_all
from .format import Format, Layer, Options, listed
from .lora_reader import KOHYA, layers_of, wanted
from .lora_writer import pairs


class Layered(Format):
    """A format of LoRA that a table of places describes.

    Class attributes:
        ends: how keys end, to what the tensor is (`_pairs.PARTS`). `files`: what it is called in errors.
    """

    order: ClassVar[int] = 0
    ends: ClassVar[Mapping[str, str]] = KOHYA
    files: ClassVar[str]

    @abstractmethod
    def places(self, tower: Tower) -> Sequence[Place]:
        """The layers of a tower as they are written; none where the format has no names for it."""

    def readable(self, tower: Tower) -> Iterable[Place]:
        """The layers of a tower by all names that they are read by."""
        return self.places(tower)

    def layers(self, file: File) -> list[Layer]:
        return layers_of(file, self.ends)

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        return attach_all(model, file, [wanted(model, file, options, self.known(model), self.ends)], options)

    def known(self, model: Any) -> dict[str, Place]:
        """The layers of a model or pipeline by every name."""
        return {name: place for tower in towers_of(model) for place in self.readable(tower) for name in place.names}

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        target = destination(path, self.file)
        tensors: dict[str, Tensor] = {}
        for name, pair in pairs(listed(attachments), target, self.places, self.files):
            tensors |= {f"{name}.{end}": tensor for end, tensor in self.tensors(pair).items()}
        return write(target, tensors, header(provenance))

    def tensors(self, pair: Pair) -> dict[str, Tensor]:
        """The tensors of a layer by the ends of their keys."""
        down, up, scaling = pair
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(scaling * down.shape[0])}


def header(provenance: Mapping[str, Any] | None) -> dict[str, str]:
    """Metadata of a file: that its tensors are torch's, and where it comes from."""
    return {"format": "pt", **({"provenance": json.dumps(dict(provenance))} if provenance else {})}

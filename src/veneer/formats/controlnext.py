"""The network of a ControlNeXt as its authors save it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from ..injection import Attachment, LoadError
from ..injection.towers import Tower
from ._attaching import Wanted, attach_all, method_of
from ._format import Format, Layer, Options
from ._guiding import drafted, fit, parts, shapes, side, single, unet_of
from ._reading import File
from ._writing import destination, write

PLACE = "place"  # in the header, where it is not the family's own
BESIDE = ("unet.safetensors", "unet_weight_increasements.safetensors")  # what the authors call changed weights of the base


class ControlNeXt(Format):
    """`time_embedding.*`, `embedding.{i}`, `down_res.{i}`, `down_sample.{i}`, `mid_convs.{i}`: the network's own names.

    Where its feature is added is not in the authors' files: behind the first convolution for SDXL, else behind the first block;
    the header says where we have it otherwise. The base's changed weights, which the authors save beside it, are not loaded, and
    the report says that they are there: load them into the UNet first.
    Source: dvlab-research/ControlNeXt `ControlNeXt-SD1.5-Training`, `ControlNeXt-SDXL-Training`.
    """

    name: ClassVar[str] = "controlnext"
    file: ClassVar[str] = "controlnet.safetensors"
    order: ClassVar[int] = -1

    def reads(self, file: File) -> bool:
        starts = {key.partition(".")[0] for key in file.shapes}
        return {"down_res", "mid_convs", "time_embedding"} <= starts

    def layers(self, file: File) -> list[Layer]:
        return parts(file, self.name, lambda name: name.partition(".")[0])

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        if not any(key.startswith("embedding.") for key in file.shapes):
            raise LoadError(
                f"{file.path}: it has no stem, 'embedding.0.weight': it is of the authors' first design, for Stable Diffusion 1 "
                "or for videos. No method here is that network."
            )
        tower, site = unet_of(model, file, "a ControlNeXt")
        own = {"channels": side(file, "embedding.0.weight", 1, 4), "place": _place(file, tower)}
        expected = shapes(drafted(file, lambda: method_of(self.name, own).build(site)))
        found = fit(file, expected, {name: name for name in expected}, tower, options, self.name)
        tensors = file.tensors(finite=options.strict, names=set(found.keys.values()))
        state = {f"{site.name}:{name}": tensors[key] for name, key in found.keys.items()}
        there = [name for name in BESIDE if file.path.with_name(name).is_file()]
        notes = [f"{name} beside it has changed weights of the base, which were not loaded" for name in there]
        wanted = Wanted(self.name, self.name, own, [site.name], state, notes=notes, unused=found.unused)
        return attach_all(model, file, [wanted], options)

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        target = destination(path, self.file)
        attachment = single(attachments, target, self.name, "a ControlNeXt's files")
        method: Any = attachment.method
        ((site, adapter),) = attachment.parts.values()
        usual = method.place == _usual(attachment.towers[site.component])
        return write(target, adapter.state_dict(), {"format": "pt"} | ({} if usual else {PLACE: method.place}))


def _place(file: File, tower: Tower) -> str:
    """Where the feature is added: as the header says, else as the authors do in the model's family."""
    told = file.metadata.get(PLACE, _usual(tower.module))
    if not re.fullmatch("block|stem", told):
        raise LoadError(f"{file.path}: the header's '{PLACE}' is {told[:40]!r}; expected block or stem. It is damaged.")
    return told


def _usual(unet: Any) -> str:
    return "stem" if unet.config.get("addition_embed_type") == "text_time" else "block"


save = ControlNeXt().save

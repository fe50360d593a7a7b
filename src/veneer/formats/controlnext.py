"""The network of a ControlNeXt as its authors save it, and the weights of the base that they trained with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.towers import Tower

from ._control.base_weights import ADDED, OF, load_beside, replaced
from ._control.networks import drafted, fit, only, parts, shapes, side, unet_of
from ._core.attach import Wanted, attach_all, method_of, migrated, refuse_merged
from ._core.format import Format, Layer, Options
from ._core.lora_config import refuse_trained
from ._io.reader import File
from ._io.writer import destination, refuse_unusable, write

PLACE, REVISION = "place", "revision"  # in the header, where the place is not the family's own
WEIGHTS = "unet.safetensors"  # of the two names that the authors have, the one for tensors that replace the base's
FILES = "a ControlNeXt's files"


class ControlNeXt(Format):
    """`time_embedding.*`, `embedding.{i}`, `down_res.{i}`, `down_sample.{i}`, `mid_convs.{i}`: the network's own names.

    Where its feature is added is not in the authors' files: at the first block's input for SDXL, else at its output; the header
    says so where ours is elsewhere. Before revision 2 `stem` also changed the first skip feature: a header that names it without
    a revision is rejected; such a file for SDXL has no mark and now computes the authors' function.

    Trained weights of the UNet are in a second file beside it, `unet.safetensors` or `unet_weight_increasements.safetensors`,
    under the names of the UNet's state dict: whole tensors of some or of all weights, or increments W − W₀. Both are read under
    either name and told apart by their values; those that change the base become `train` of the attachment, and leave with it.

    Written are whole tensors in the base's dtype, `unet.safetensors`, bitwise those that were trained. An increment in single
    precision cannot promise that: W₀ + (W − W₀) is surely W where W₀/2 ≤ W ≤ 2 W₀, else it may be off by a unit in the last
    place of the larger of W and W − W₀, as it often is where a weight has changed its sign.
    The authors' scripts take the file without `--load_weight_increasement` (`--save_load_weights_increaments` for SD 1.5).
    Source: dvlab-research/ControlNeXt `ControlNeXt-SD1.5-Training`, `ControlNeXt-SDXL-Training`, `ControlNeXt-SDXL`.
    """

    name: ClassVar[str] = "controlnext"
    file: ClassVar[str] = "controlnet.safetensors"
    order: ClassVar[int] = -1
    beside: ClassVar[tuple[str, ...]] = tuple(ADDED)

    def reads(self, file: File) -> bool:
        starts = {key.partition(".")[0] for key in file.shapes}
        return {"down_res", "mid_convs", "time_embedding"} <= starts

    def layers(self, file: File) -> list[Layer]:
        return parts(file, self.name, lambda name: name.partition(".")[0])

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        if not any(key.startswith("embedding.") for key in file.shapes):
            raise LoadError(
                f"{file.path}: it has no stem, 'embedding.0.weight': it is of the authors' first design, for Stable Diffusion 1 "
                "or for videos. No method here is that network.",
                file=file.path,
                missing=["embedding.0.weight"],
            )
        tower, site = unet_of(model, file, "a ControlNeXt")
        own = {"channels": side(file, "embedding.0.weight", 1, 4), "place": _place(file, tower)}
        expected = shapes(drafted(file, lambda: method_of(self.name, own).build(site)))
        found = fit(file, expected, {name: name for name in expected}, tower, options, self.name)
        tensors = file.tensors(finite=options.strict, names=set(found.keys.values()))
        state = {f"{site.name}:{name}": tensors[key] for name, key in found.keys.items()}
        base = load_beside(file.path, tower, options, self.name)
        wanted = Wanted(
            name=self.name, method=self.name, config=own, sites=[site.name], state=state | base.state, train=base.train,
            notes=base.notes, unused=[*found.unused, *base.unused],
        )  # fmt: skip
        return attach_all(model, file, [wanted], options)

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        target = destination(path, self.file)
        attachment = only(attachments, target, self.name, FILES)
        method: Any = attachment.method
        ((site, adapter),) = attachment.parts.values()
        unet = attachment.towers[site.component]
        keys = {path: key for key, (component, path) in attachment.extras.items() if component == site.component}
        refuse_trained(attachment, target, FILES, keys.values())
        stale = replaced(target, bool(keys))
        tensors = adapter.state_dict()
        if keys:
            refuse_merged(unet, SaveError)
            refuse_unusable(target, tensors)
            state = attachment.state_dict()
            trained = {path: state[key] for path, key in keys.items()}
            weights = write(target.with_name(WEIGHTS), trained, {"format": "pt", OF: target.name})
            stale = [path for path in stale if path != weights]
        elsewhere = {} if method.place == _usual(unet) else {PLACE: method.place, REVISION: str(method.revision)}
        written = write(target, tensors, {"format": "pt"} | elsewhere)
        for path in stale:
            path.unlink()
        return written


def _place(file: File, tower: Tower) -> str:
    """Where the feature is added: as the header says, else as the authors do in the model's family."""
    told = file.metadata.get(PLACE, _usual(tower.module))
    if not re.fullmatch("block|stem", told):
        message = f"{file.path}: the header's '{PLACE}' is {told[:40]!r}; expected block or stem. It is damaged."
        raise LoadError(message, file=file.path, where=PLACE, given=told[:40], expected=("block", "stem"))
    if PLACE in file.metadata:
        revision = file.metadata.get(REVISION, "1")
        if not re.fullmatch("[1-9][0-9]{0,3}", revision):
            message = f"{file.path}: the header's '{REVISION}' is {revision[:40]!r}; expected a positive integer. It is corrupt."
            raise LoadError(message, file=file.path, where=REVISION, given=revision[:40])
        migrated(file, {"method": ControlNeXt.name, "revision": int(revision)}, {PLACE: told}, ())
    return told


def _usual(unet: Any) -> str:
    return "stem" if unet.config.get("addition_embed_type") == "text_time" else "block"


save = ControlNeXt().save

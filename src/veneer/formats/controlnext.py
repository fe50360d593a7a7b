"""ControlNeXt networks as their authors save them, and the base weights that were trained with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.towers import Tower

from ._control.controlnext_base_weights import FILE_NAMES, OF, load_base_weights, stale_files
from ._control.networks import build_on_meta, dimension, layers_by_part, match_tensors, only_attachment, shapes, unet_of
from ._core.attach import AttachmentSpec, attach_all, build_method, migrate_config, reject_merged
from ._core.format import Format, LayerInfo, Options
from ._core.lora_config import reject_trained_base
from ._io.reader import File
from ._io.writer import reject_unusable, write

PLACE, REVISION = "place", "revision"  # metadata keys, written if the place is not the family's default
WEIGHTS = "unet.safetensors"  # of the authors' two names, the one for tensors that replace base weights
FILES = "a ControlNeXt's files"


class ControlNeXt(Format):
    """`time_embedding.*`, `embedding.{i}`, `down_res.{i}`, `down_sample.{i}`, `mid_convs.{i}`: the network's own names.

    `place`, where the network's feature is added, is not in the authors' files: the first block's input for SDXL, else its
    output; the metadata of veneer's files records any other place. Before revision 2, `stem` also changed the first skip feature:
    metadata that names it without a revision is rejected; such a file for SDXL is unmarked and now computes the authors'
    function.

    Trained weights of the UNet are in a second file beside it, `unet.safetensors` or `unet_weight_increasements.safetensors`,
    under the names of the UNet's state dict: full tensors of some or of all weights, or increments W − W₀. Both are read under
    either name and distinguished by their values; those that differ from the base become `train` of the attachment and are
    removed with it.

    Full tensors are written in the base's dtype, to `unet.safetensors`, bitwise as trained. Increments in float32 could not
    guarantee this: W₀ + (W − W₀) equals W for W₀/2 ≤ W ≤ 2 W₀, but otherwise may be off by a unit in the last
    place of the larger of W and W − W₀, as is common for weights that changed sign.
    The authors' scripts load the file without `--load_weight_increasement` (`--save_load_weights_increaments` for SD 1.5).
    Source: dvlab-research/ControlNeXt `ControlNeXt-SD1.5-Training`, `ControlNeXt-SDXL-Training`, `ControlNeXt-SDXL`.
    """

    name: ClassVar[str] = "controlnext"
    file: ClassVar[str] = "controlnet.safetensors"
    order: ClassVar[int] = -1
    beside: ClassVar[tuple[str, ...]] = tuple(FILE_NAMES)

    def reads(self, file: File) -> bool:
        starts = {key.partition(".")[0] for key in file.shapes}
        return {"down_res", "mid_convs", "time_embedding"} <= starts

    def layers(self, file: File) -> list[LayerInfo]:
        return layers_by_part(file, self.name, lambda name: name.partition(".")[0])

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        if not any(key.startswith("embedding.") for key in file.shapes):
            raise LoadError(
                f"{file.path}: has no stem, 'embedding.0.weight': it uses the authors' first design, for Stable Diffusion 1 "
                "or for videos, which veneer does not support.",
                file=file.path,
                missing=["embedding.0.weight"],
            )
        tower, site = unet_of(model, file, "a ControlNeXt")
        own = {"channels": dimension(file, "embedding.0.weight", 1, 4), "place": _place(file, tower)}
        expected = shapes(build_on_meta(file, lambda: build_method(self.name, own).build(site)))
        found = match_tensors(file, expected, {name: name for name in expected}, tower, options, self.name)
        tensors = file.tensors(finite=options.strict, names=set(found.keys.values()))
        state = {f"{site.name}:{name}": tensors[key] for name, key in found.keys.items()}
        base = load_base_weights(file.path, tower, options, self.name)
        spec = AttachmentSpec(
            name=self.name, method=self.name, config=own, sites=[site.name], state=state | base.state, train=base.train,
            notes=base.notes, unused=[*found.unused, *base.unused],
        )  # fmt: skip
        return attach_all(model, file, [spec], options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        attachment = only_attachment(attachments, target, self.name, FILES)
        method: Any = attachment.method
        ((site, adapter),) = attachment.parts.values()
        unet = attachment.towers[site.component]
        keys = {path: key for key, (component, path) in attachment.extras.items() if component == site.component}
        reject_trained_base(attachment, target, FILES, keys.values())
        stale = stale_files(target, bool(keys))
        tensors = adapter.state_dict()
        if keys:
            reject_merged(unet, SaveError)
            reject_unusable(target, tensors)
            state = attachment.state_dict()
            trained = {path: state[key] for path, key in keys.items()}
            weights = write(target.with_name(WEIGHTS), trained, {"format": "pt", OF: target.name})
            stale = [path for path in stale if path != weights]
        elsewhere = {} if method.place == _default_place(unet) else {PLACE: method.place, REVISION: str(method.revision)}
        written = write(target, tensors, {"format": "pt"} | elsewhere)
        for path in stale:
            path.unlink()
        return written


def _place(file: File, tower: Tower) -> str:
    """Where the feature is added: from the metadata, else the authors' place for the model's family."""
    place = file.metadata.get(PLACE, _default_place(tower.module))
    if not re.fullmatch("block|stem", place):
        message = f"{file.path}: metadata '{PLACE}' is {place[:40]!r}; expected block or stem. The file is corrupt."
        raise LoadError(message, file=file.path, where=PLACE, given=place[:40], expected=("block", "stem"))
    if PLACE in file.metadata:
        revision = file.metadata.get(REVISION, "1")
        if not re.fullmatch("[1-9][0-9]{0,3}", revision):
            message = (
                f"{file.path}: metadata '{REVISION}' is {revision[:40]!r}; expected a positive integer. The file is corrupt."
            )
            raise LoadError(message, file=file.path, where=REVISION, given=revision[:40])
        migrate_config(file, {"method": ControlNeXt.name, "revision": int(revision)}, {PLACE: place}, ())
    return place


def _default_place(unet: Any) -> str:
    return "stem" if unet.config.get("addition_embed_type") == "text_time" else "block"


save = ControlNeXt().save

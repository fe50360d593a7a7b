"""LoRA as diffusers wrote it until 0.24 or so: in attention processors, and then beside the layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from veneer.injection import Attachment, SaveError
from veneer.injection.towers import Tower

from ._core.layer_keys import Layered
from ._core.lora_config import component_of
from ._core.lora_reader import DOWN, UP
from ._io.reader import File
from ._io.writer import destination
from ._names.kohya import Place
from ._names.modules import paths

ENDS = tuple(f"{lora}.{half}.weight" for lora in ("_lora", ".lora", ".lora_linear_layer") for half in ("down", "up"))
PROCESSED = re.compile(r"(?P<attn>.+)\.(?P<projection>to_[qkv]|to_out)(?:\.0)?")
CLIP = re.compile(r"(?P<attn>.+\.self_attn)\.(?P<projection>q|k|v|out)_proj")


class DiffusersOld(Layered):
    """`unet.{attention}.processor.to_q_lora.down.weight` (r, d_in) and `….up.weight` (d_out, r); ΔW = B A, without alpha.

    Later `unet.{path}.lora.down.weight`, and `text_encoder.text_model.{path}.lora_linear_layer.down.weight`, or in attention
    `….self_attn.to_q_lora.down.weight`. The first files have the UNet alone, without `unet.`. Read only: diffusers writes its
    newer layout.
    Source: diffusers `utils/state_dict_utils.py`, its maps to peft; `loaders/unet.py`.
    """

    name: ClassVar[str] = "diffusers_old"
    file: ClassVar[str] = "pytorch_lora_weights.safetensors"
    files: ClassVar[str] = "diffusers' old LoRA files"
    ends = {"down.weight": DOWN, "up.weight": UP}

    def reads(self, file: File) -> bool:
        flux = ("double_blocks.", "single_blocks.", "diffusion_model.")  # XLabs' and ComfyUI's
        return any(key.endswith(ENDS) for key in file.shapes) and not any(key.startswith(flux) for key in file.shapes)

    def places(self, tower: Tower) -> Sequence[Place]:
        return []

    def readable(self, tower: Tower) -> Iterator[Place]:
        component = tower.component or component_of(tower.module)
        prefixes = (f"{component}.", "") if component in ("unet", "transformer") or not tower.component else (f"{component}.",)
        for path, site in paths(tower).items():
            spelt = [p for inside in _inside(component, path) for p in _spellings(inside)]
            yield Place(tuple(prefix + p for prefix in prefixes for p in spelt), (site,))

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        target = destination(path, self.file)
        message = f"{target}: this layout is read only. Write diffusers, which reads it as well."
        raise SaveError(message, file=target, given=self.name, expected=("diffusers",))


def _inside(component: str, path: str) -> tuple[str, ...]:
    return (f"text_model.{path}", path) if component.startswith("text_encoder") else (path,)


def _spellings(path: str) -> Iterator[str]:
    yield from (f"{path}.lora", f"{path}.lora_linear_layer")
    if match := PROCESSED.fullmatch(path):
        yield f"{match['attn']}.processor.{match['projection']}_lora"
    if match := CLIP.fullmatch(path):
        yield f"{match['attn']}.to_{match['projection']}_lora"


save = DiffusersOld().save

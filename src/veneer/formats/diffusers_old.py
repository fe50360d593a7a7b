"""LoRA as diffusers wrote it until about 0.24: first in attention processors, then beside the layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from veneer.injection import Attachment, SaveError
from veneer.injection.towers import Tower

from ._core.layer_keys import LayerTableFormat
from ._core.lora_config import component_of
from ._core.lora_reader import DOWN, UP
from ._io.reader import File
from ._names.kohya import NamedLayer
from ._names.modules import weight_paths

ENDS = tuple(f"{lora}.{half}.weight" for lora in ("_lora", ".lora", ".lora_linear_layer") for half in ("down", "up"))
PROCESSED = re.compile(r"(?P<attn>.+)\.(?P<projection>to_[qkv]|to_out)(?:\.0)?")
CLIP = re.compile(r"(?P<attn>.+\.self_attn)\.(?P<projection>q|k|v|out)_proj")


class DiffusersOld(LayerTableFormat):
    """`unet.{attention}.processor.to_q_lora.down.weight` (r, d_in) and `….up.weight` (d_out, r); ΔW = B A, without alpha.

    Later `unet.{path}.lora.down.weight`, and `text_encoder.text_model.{path}.lora_linear_layer.down.weight`, or in attention
    `….self_attn.to_q_lora.down.weight`. The earliest files have only the UNet, without `unet.`. Read only: diffusers writes its
    newer format.
    Source: diffusers `utils/state_dict_utils.py`, its mappings to peft; `loaders/unet.py`.
    """

    name: ClassVar[str] = "diffusers_old"
    file: ClassVar[str] = "pytorch_lora_weights.safetensors"
    files: ClassVar[str] = "diffusers' old LoRA files"
    suffixes = {"down.weight": DOWN, "up.weight": UP}

    def reads(self, file: File) -> bool:
        flux = ("double_blocks.", "single_blocks.", "diffusion_model.")  # XLabs' and ComfyUI's
        return any(key.endswith(ENDS) for key in file.shapes) and not any(key.startswith(flux) for key in file.shapes)

    def places(self, tower: Tower) -> Sequence[NamedLayer]:
        return []

    def readable(self, tower: Tower) -> Iterator[NamedLayer]:
        component = tower.component or component_of(tower.module)
        prefixes = (f"{component}.", "") if component in ("unet", "transformer") or not tower.component else (f"{component}.",)
        for path, site in weight_paths(tower).items():
            spellings = [p for inside in _inside(component, path) for p in _spellings(inside)]
            yield NamedLayer(tuple(prefix + p for prefix in prefixes for p in spellings), (site,))

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        message = f"{target}: this format is read only. Use diffusers, which diffusers reads as well."
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

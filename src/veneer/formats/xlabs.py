"""LoRA of FLUX.1 as XLabs' x-flux writes it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from veneer.injection.towers import Tower

from ._core.layer_keys import LayerTableFormat
from ._core.lora_reader import DOWN, UP
from ._io.reader import File
from ._names.kohya import NamedLayer
from ._names.kohya_fused import LoRAFactors
from ._names.modules import original_modules

PARTS = {"img_attn.qkv": "qkv_lora1", "img_attn.proj": "proj_lora1", "txt_attn.qkv": "qkv_lora2", "txt_attn.proj": "proj_lora2"}
KEY = re.compile(r"(?:diffusion_model\.)?(?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?\.(?:down|up)\.weight")


class XLabs(LayerTableFormat):
    """`double_blocks.{i}.processor.qkv_lora1.down.weight` (r, d_in) and `….up.weight` (d_out, r); ΔW = B A, without alpha.

    `lora1` is the image stream, `lora2` the text stream; `qkv` one pair of factors for the three projections, `proj` the output.
    Single blocks: `single_blocks.{i}.processor.qkv_lora` on the first rows of `linear1`, `proj_lora` on `linear2`. A scale is
    folded into B. No other layer of the model has a name.
    Source: XLabs-AI/x-flux `src/flux/modules/layers.py`.
    """

    name: ClassVar[str] = "xlabs"
    file: ClassVar[str] = "lora.safetensors"
    files: ClassVar[str] = "XLabs' LoRA files"
    suffixes = {"down.weight": DOWN, "up.weight": UP}

    def reads(self, file: File) -> bool:
        return any(KEY.fullmatch(key) for key in file.shapes)

    def places(self, tower: Tower) -> Sequence[NamedLayer]:
        found = []
        for module in original_modules(tower) if type(tower.module).__name__ == "FluxTransformer2DModel" else ():
            kind, _, rest = module.path.partition("_blocks.")
            number, _, part = rest.partition(".")
            name = f"{kind}_blocks.{number}.processor."
            if kind == "double" and part in PARTS:
                found.append(NamedLayer((name + PARTS[part],), module.sites))
            elif kind == "single" and part == "linear1":
                found.append(NamedLayer((name + "qkv_lora",), module.sites[:3]))
            elif kind == "single" and part == "linear2":
                found.append(NamedLayer((name + "proj_lora",), module.sites))
        return found

    def readable(self, tower: Tower) -> Iterable[NamedLayer]:
        return [dataclasses.replace(p, names=(*p.names, f"diffusion_model.{p.names[0]}")) for p in self.places(tower)]

    def tensors(self, pair: LoRAFactors) -> dict[str, Tensor]:
        return {"down.weight": pair.down, "up.weight": pair.up if pair.scaling == 1 else pair.up * pair.scaling}


save = XLabs().save

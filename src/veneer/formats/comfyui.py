"""LoRA with ComfyUI's names: the dotted paths of the original release."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from veneer.injection.towers import Tower

from ._core.layer_keys import LayerTableFormat
from ._core.lora_config import ENCODERS
from ._core.lora_reader import DOWN, KOHYA, UP
from ._io.model_spec import COMFYUI
from ._io.reader import File
from ._names.kohya import NamedLayer
from ._names.modules import T5, diffusers_modules, original_modules, sliced_modules
from ._names.transformers import names_of

PREFIXES = ("diffusion_model.", "text_encoders.")
BLOCKS = re.compile(r"transformer\.(?:double|single)_blocks\..+\.lora_[AB]\.")
"""Keys of HunyuanVideo in earlier versions of diffusion-pipe. OneTrainer has the prefix with other ends."""


class ComfyUI(LayerTableFormat):
    """`diffusion_model.{path}.lora_down.weight` (r, d_in[, k, k]), `….lora_up.weight` (d_out, r[, 1, 1]), `….alpha` ().

    `{path}`: that of ComfyUI, mostly of the original release, such as `double_blocks.0.img_attn.qkv` (FLUX, Chroma),
    `joint_blocks.0.x_block.attn.qkv` (SD 3), `layers.0.attention.qkv` (Lumina 2, Z-Image) or `input_blocks.4.1.proj_in` (SD).
    Text encoders: `text_encoders.{clip_l, clip_h, clip_g, t5xxl}.transformer.{path}`. ΔW = (alpha / r)·B A, alpha = r if it is
    missing. Also read are `lora_A` and `lora_B`, as written by diffusion-pipe and others, and diffusers' paths behind the
    prefix, as written by ai-toolkit: `diffusion_model.layers.0.attention.to_q`.
    Source: ComfyUI `comfy/lora.py`, `comfy/weight_adapter/lora.py`.
    """

    name: ClassVar[str] = "comfyui"
    file: ClassVar[str] = "lora.safetensors"
    files: ClassVar[str] = "ComfyUI's LoRA files"
    implementation: ClassVar[str | None] = COMFYUI
    suffixes = {
        **KOHYA, "lora_A.weight": DOWN, "lora_B.weight": UP, "lora_A.default.weight": DOWN, "lora_B.default.weight": UP,
        "lora.down.weight": DOWN, "lora.up.weight": UP,
    }  # fmt: skip

    def reads(self, file: File) -> bool:
        """True unless the file has `bundle_emb.` keys, which OneTrainer adds to the same names."""
        others = any(".processor." in key or key.startswith("bundle_emb.") for key in file.shapes)
        return any(key.startswith(PREFIXES) or BLOCKS.match(key) for key in file.shapes) and not others

    def places(self, tower: Tower) -> Sequence[NamedLayer]:
        record = names_of(tower.module)
        prefixes = record.prefixes if record is not None else ("diffusion_model",)
        if type(tower.module).__name__ in (*ENCODERS, T5):
            prefixes = (f"text_encoders.{encoder(tower)}.transformer",)
        modules = (*sliced_modules(tower), *original_modules(tower))
        return [NamedLayer(_names(prefixes, (m.path, *m.spellings)), m.sites, m.swapped) for m in modules]

    def readable(self, tower: Tower) -> Iterable[NamedLayer]:
        yield from (NamedLayer((f"diffusion_model.{m.path}",), m.sites) for m in diffusers_modules(tower))
        yield from self.places(tower)


def _names(prefixes: Iterable[str], paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{path}" for prefix in prefixes for path in paths)


def encoder(tower: Tower) -> str:
    """ComfyUI's name of a text encoder: by its class and position; CLIP-H of SD 2 by its width."""
    kind = type(tower.module).__name__
    if kind == T5:
        return "t5xxl"
    if (tower.component or ENCODERS[kind]) == "text_encoder_2":
        return "clip_g"
    width: int = tower.module.config.hidden_size  # type: ignore[union-attr, assignment]
    return "clip_h" if width == 1024 else "clip_l"


save = ComfyUI().save

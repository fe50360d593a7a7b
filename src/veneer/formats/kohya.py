"""LoRA as kohya's sd-scripts and musubi-tuner write it, and A1111, Forge and ComfyUI read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from veneer.injection import Attachment
from veneer.injection.towers import towers_of

from ._core.attach import attach_all
from ._core.format import Format, LayerInfo, Options, pt_metadata
from ._core.layer_keys import kohya_tensors
from ._core.lora_reader import PARTS, layers_of, lora_spec
from ._core.lora_writer import LayerTensors, layers_to_write
from ._io.model_spec import HASHES, model_spec
from ._io.reader import File
from ._io.writer import write
from ._names.kohya import base_model_version, named_layers, readable_layers
from ._names.transformers import names_of

PREFIXES = ("lora_unet_", "lora_te")


class Kohya(Format):
    """`{module}.lora_down.weight` (r, d_in[, k, k]), `….lora_up.weight` (d_out, r[, 1, 1]), `….alpha` (); ΔW = (alpha / r)·B A.

    `{module}`: `lora_unet_`, or `lora_te_` for the text encoder of SD 1 and 2, `lora_te1_` and `lora_te2_` for those of SDXL,
    `lora_te1_` and `lora_te3_` (T5) for those of FLUX, all three for those of SD 3; then the path with underscores. UNets have
    two spellings, diffusers' and that of the original release; both are read. Written is the spelling of sd-scripts: the original
    release's for SDXL, diffusers' for SD 1 and 2. Diffusion transformers: that of ComfyUI, mostly the original release's, with
    fused projections; diffusers' spelling, which musubi-tuner writes for Z-Image, is also read.

    A missing alpha means alpha = r. `.lora_mid.weight` (r, r, k, k) between 1×1 `down` and `up` (Tucker) is multiplied into
    `down`. A fused projection is read as one LoRA per slice, restricted to components with nonzero rows there, and written as
    one LoRA of all its slices, block by block. The alpha of a fused projection refers to its rank in the file, as in every
    reader, although sd-scripts' `split_qkv` trains with the rank of one slice.

    diffusers 0.42 itself reads a single alpha for all attention layers of a UNet from this format; if they differ, use
    diffusers' own format.

    Other adapters in the same layout (DoRA, LoHa, LoKr, OFT, …) have the format `lycoris`.
    Source: kohya-ss/sd-scripts `networks/lora.py`, `lora_flux.py`, `lora_sd3.py`, `lora_lumina.py`,
    `library/sdxl_original_unet.py`; kohya-ss/musubi-tuner `networks`; diffusers 0.42 `loaders/lora_conversion_utils.py`.
    """

    name: ClassVar[str] = "kohya"
    file: ClassVar[str] = "lora.safetensors"

    def reads(self, file: File) -> bool:
        return any(k.startswith(PREFIXES) and "." in k for k in file.shapes) or any(k.endswith(PARTS[:2]) for k in file.shapes)

    def layers(self, file: File) -> list[LayerInfo]:
        return layers_of(file)

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        known = {name: place for tower in towers_of(model) for place in readable_layers(tower) for name in place.names}
        return attach_all(model, file, [lora_spec(model, file, options, known)], options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        versions = {v for a in attachments for m in a.towers.values() if (v := base_model_version(m))}
        names = partial(named_layers, numbered=is_numbered(attachments, versions))
        tensors = LayerTensors(layers_to_write(attachments, target, names, "kohya's LoRA files"), kohya_tensors)
        records = [record for a in attachments for m in a.towers.values() if (record := names_of(m)) is not None]
        module = next((record.network_module for record in records if record.network_module), "networks.lora")
        metadata = {**_metadata(tensors, module), **model_spec(attachments, provenance)}
        return write(target, tensors, pt_metadata(provenance, metadata), HASHES)


def is_numbered(attachments: Sequence[Attachment], versions: Set[str]) -> bool:
    """True if the first text encoder is one of several, by the pipeline or the base model, even if only it is adapted."""
    components = {site.component for a in attachments for site in a.supported_sites}
    return bool(versions & {"sdxl_base_v1-0", "flux1"}) or "text_encoder_2" in components


def _metadata(tensors: Mapping[str, Tensor], module: str) -> dict[str, str]:
    """Metadata that kohya's trainers write and other tools read: network module, rank and alpha."""
    ranks = [t.shape[0] for key, t in tensors.items() if key.endswith(PARTS[0])]
    alphas = [float(t) for key, t in tensors.items() if key.endswith(".alpha")]
    common = [Counter(values).most_common(1)[0][0] for values in (ranks, alphas)]
    return {"ss_network_module": module, "ss_network_dim": str(common[0]), "ss_network_alpha": str(common[1])}


save = Kohya().save

"""IP-Adapters as their authors and diffusers store them: `image_proj.*` and `ip_adapter.*` in one file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.attention_sites import AttentionSite
from veneer.injection.towers import Tower, towers_of

from ._control.networks import (
    build_on_meta,
    check_count,
    dimension,
    layers_by_part,
    match_tensors,
    network_name,
    shapes,
    single_attachment,
)
from ._core.attach import AttachmentSpec, attach_all, build_method
from ._core.format import Format, LayerInfo, Options
from ._core.lora_config import NATIVE
from ._io.reader import File
from ._io.writer import write

IMAGE, LAYERS = "image_proj.", "ip_adapter."
TOKENS, DEPTH, WIDEST = 4, 4, 1280  # default tokens of base; default layers and maximum default width of the resampler
MARK = re.compile(r"ip_adapter\.\d+\.to_[kv]_ip\.weight|ip_adapter_proj_model\.|.*\.processor\.ip_adapter_")
# other networks under these names, by keys that only they have
OTHERS = {
    r"ip_adapter_proj_model\.|double_blocks\.|ip_adapter\.\d+\.to_k_ip\.bias": "an IP-Adapter for FLUX",
    r"ip_adapter\.\d+\.norm_ip\.|image_proj\.time_": "an IP-Adapter for Stable Diffusion 3",
    r"image_proj\.perceiver_resampler\.": "IP-Adapter FaceID Plus, which also needs face recognition features",
    r"image_proj\.proj\.3\.": "IP-Adapter Full Face, which projects each patch separately",
    r"image_proj\.proj\.0\.|\.to_(?:q|k|v|out)_lora\.": "IP-Adapter FaceID, which needs face recognition features",
}


class IPAdapter(Format):
    """`ip_adapter.{2k + 1}.to_k_ip.weight`, `….to_v_ip.weight` of the k-th cross-attention in the order of `unet.attn_processors`
    (down, up, middle), and the image projection: `image_proj.proj`, `image_proj.norm` (base), or `latents`,
    `proj_in`, `layers.{i}.0`, `layers.{i}.1`, `proj_out`, `norm_out` (plus). Kind and sizes are derived from the tensors.

    The same form is written, and `load_ip_adapter` of diffusers' pipelines loads it; base with 4 tokens, plus with 4 layers, on
    all cross-attentions of a model.
    Source: tencent-ailab/IP-Adapter `ip_adapter/ip_adapter.py`, `resampler.py`; diffusers 0.42 `loaders/unet.py`.
    """

    name: ClassVar[str] = "ip_adapter"
    file: ClassVar[str] = "ip-adapter.safetensors"
    order: ClassVar[int] = -1

    def reads(self, file: File) -> bool:
        return any(MARK.match(key) for key in file.shapes)

    def layers(self, file: File) -> list[LayerInfo]:
        return layers_by_part(file, self.name, lambda name: name.partition(".")[0])

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        _reject_other_networks(file)
        tower, sites = _sites(model, file)
        own = _options(file, min(sites[0].context_width, WIDEST))
        shared = build_on_meta(file, lambda: build_method(self.name, own).build_shared(sites))
        expected: dict[str, tuple[int, ...]] = {}
        names: dict[str, str] = {}
        for key, shape in shapes(shared).items():
            expected[f"shared.{key}"], names[f"shared.{key}"] = shape, IMAGE + key
        for number, site in enumerate(sites):
            for end in ("to_k_ip.weight", "to_v_ip.weight"):
                expected[f"{number}.{end}"] = (site.width, site.context_width)
                names[f"{number}.{end}"] = _key(number, end)
        found = match_tensors(file, expected, names, tower, options, self.name)
        stored = file.tensors(finite=options.strict, names=set(found.keys.values()))
        state: dict[str, Tensor] = {}
        for name, key in found.keys.items():
            start, _, end = name.partition(".")
            if start == "shared":  # every layer has the same tensors
                state |= {f"{site.name}:{name}": stored[key] for site in sites}
            else:
                state[f"{sites[int(start)].name}:{end}"] = stored[key]
        spec = AttachmentSpec(self.name, self.name, own, [s.name for s in sites], state, unused=found.unused)
        return attach_all(model, file, [spec], options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        return write(
            target, tensors(single_attachment(attachments, target, self.name, "an IP-Adapter's files"), target), {"format": "pt"}
        )


def tensors(attachment: Attachment, target: Path) -> dict[str, Tensor]:
    """The tensors of an attachment.

    Raises:
        SaveError: the format does not support its sizes, or it is on some layers only.
    """
    method: Any = attachment.method
    plain = method.depth == DEPTH if method.kind == "plus" else method.tokens in (0, TOKENS)
    if not plain:
        size = f"{method.depth} layers" if method.kind == "plus" else f"{method.tokens} tokens"
        raise SaveError(
            f"{target}: '{attachment.name}' ({method.kind}) has {size}; readers of this format assume 4. {NATIVE}",
            file=target,
            where=attachment.name,
            given=size,
            expected=4,
        )
    supported = _processor_order(attachment.supported_sites)
    parts_ = attachment.parts
    missing = [site.name for site in supported if site.name not in parts_]
    if missing or not supported or len({site.component for site in supported}) > 1:
        raise SaveError(
            f"{target}: '{attachment.name}' is not on {', '.join(missing[:4])}; this format holds all cross-attentions of one "
            f"model, by index. {NATIVE}",
            file=target,
            where=attachment.name,
            expected=tuple(missing),
        )
    first: nn.Module = parts_[supported[0].name][1].get_submodule("shared")
    found = {IMAGE + key: tensor for key, tensor in first.state_dict().items()}
    for number, site in enumerate(supported):
        own = parts_[site.name][1].state_dict()
        found |= {_key(number, end): own[end] for end in ("to_k_ip.weight", "to_v_ip.weight")}
    return found


def _key(number: int, end: str) -> str:
    """Key of a cross-attention's tensor. Indices also count the self-attentions, which alternate with them."""
    return f"{LAYERS}{2 * number + 1}.{end}"


def _reject_other_networks(file: File) -> None:
    for mark, what in OTHERS.items():
        key = next((key for key in file.shapes if re.search(mark, key)), None)
        if key is not None:
            message = f"{file.path}: '{key}' indicates {what}; veneer supports the base and the Plus IP-Adapter for UNets."
            raise LoadError(message, file=file.path, where=key, given=network_name(what), expected=("base", "plus"))


def _processor_order(sites: Sequence[Any]) -> list[AttentionSite]:
    """The cross-attentions in the order of the model's processors."""
    return sorted((s for s in sites if isinstance(s, AttentionSite) and s.cross), key=lambda site: site.index)


def _sites(model: Any, file: File) -> tuple[Tower, list[AttentionSite]]:
    """The first tower with cross-attention, and its cross-attentions.

    Raises:
        LoadError: no tower has cross-attention.
    """
    towers = towers_of(model)
    for tower in towers:
        if sites := _processor_order(tower.sites):
            return tower, sites
    has = ", ".join(type(t.module).__name__ for t in towers)
    message = f"{file.path}: an IP-Adapter needs a model with cross-attention; the model has {has}."
    classes = tuple(type(t.module).__name__ for t in towers)
    raise LoadError(message, file=file.path, given=classes, expected="cross-attention")


def _options(file: File, dim: int) -> dict[str, Any]:
    """Options of the method, from the shapes.

    Args:
        dim: default width of the resampler.
    Raises:
        LoadError: the image projection is missing.
    """
    if f"{IMAGE}latents" in file.shapes:
        own = dimension(file, f"{IMAGE}proj_in.weight", 0, 2)
        layer = re.compile(rf"{re.escape(IMAGE)}layers\.(\d{{1,6}})\.")
        depth = len({m[1] for key in file.shapes if (m := layer.match(key))})
        return {
            "kind": "plus",
            "width": dimension(file, f"{IMAGE}proj_in.weight", 1, 2),
            "tokens": dimension(file, f"{IMAGE}latents", 1, 3),
            "depth": check_count(file, depth, "layers of the resampler"),
            "dim": 0 if own == dim else own,
        }
    rows, width = (dimension(file, f"{IMAGE}proj.weight", dim, 2) for dim in (0, 1))
    tokens, remainder = divmod(rows, dimension(file, f"{IMAGE}norm.weight", 0, 1) or 1)
    if remainder or not tokens:
        message = f"{file.path}: '{IMAGE}proj.weight' has {rows} rows, not a whole number of tokens. The file is corrupt."
        raise LoadError(message, file=file.path, where=f"{IMAGE}proj.weight", given=rows)
    return {"kind": "base", "width": width, "tokens": 0 if tokens == TOKENS else tokens}


save = IPAdapter().save

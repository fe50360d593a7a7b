"""LoRA as kohya's sd-scripts write it, and A1111, Forge and ComfyUI read it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..injection import Attachment, LoadError, SaveError
from ..injection.towers import towers_of
from ._attaching import Wanted, attach_all
from ._format import Format, Layer, Options, listed, values
from ._kohya_fused import Pair, joined, split
from ._kohya_names import Place, places, version
from ._lora import Found, config_of, refuse, shaped
from ._reading import File
from ._writing import destination, write

PREFIXES = ("lora_unet_", "lora_te")
PARTS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha")
OTHERS = {
    "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "a1.": "GLoRA", "on_input": "(IA)³",
    "diff": "full weights", "w_norm": "norms", "b_norm": "norms",
    "reshape_weight": "weights of another shape",
}  # fmt: skip


class Kohya(Format):
    """`{module}.lora_down.weight` (r, d_in[, k, k]), `….lora_up.weight` (d_out, r[, 1, 1]), `….alpha` (); ΔW = (alpha / r)·B A.

    `{module}`: `lora_unet_`, or `lora_te_` for the text encoder of SD 1 and 2, `lora_te1_` and `lora_te2_` for those of SDXL,
    `lora_te1_` and `lora_te3_` (T5) for those of FLUX; then the path with underscores. UNets have two spellings, diffusers'
    and that of the first release; both are read, and the one that sd-scripts write is written: the first release's for
    SDXL, diffusers' for SD 1 and 2. FLUX.1: first release, with fused projections.

    Missing alpha means alpha = r. `.lora_mid.weight` (r, r, k, k) between a `down` and an `up` of 1×1 (Tucker) becomes part of
    `down`. A fused projection is read as one LoRA a slice, of the components that touch its rows, and written as one LoRA
    of all its slices, block by block. The alpha of a fused one belongs to its rank as it is in the file, as every reader
    takes it, although sd-scripts' `split_qkv` trains with the rank of one slice.

    diffusers 0.42 itself reads one alpha for all attention layers of a UNet from this layout; where they differ, give it
    its own format.

    Other changes in the same layout (DoRA, LoHa, LoKr, OFT, …) are refused by the name of the key, never left out.
    Source: kohya-ss/sd-scripts `networks/lora.py`, `lora_flux.py`, `library/sdxl_original_unet.py`; diffusers 0.42
    `loaders/lora_conversion_utils.py`.
    """

    name: ClassVar[str] = "kohya"
    file: ClassVar[str] = "lora.safetensors"

    def reads(self, file: File) -> bool:
        return any(k.startswith(PREFIXES) and "." in k for k in file.shapes) or any(k.endswith(PARTS[:2]) for k in file.shapes)

    def layers(self, file: File) -> list[Layer]:
        alphas = file.tensors(finite=False, names={key for key in file.shapes if key.endswith(".alpha")})
        return [
            _layer(file, name, alphas.get(f"{name}.alpha")) for name in dict.fromkeys(k.partition(".")[0] for k in file.shapes)
        ]

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        return attach_all(model, file, [_wanted(model, file, options)], options)

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        target = destination(path, self.file)
        tensors: dict[str, Tensor] = {}
        several = listed(attachments)
        versions = {v for a in several for m in a.towers.values() if (v := version(m))}
        numbered = bool(versions & {"sdxl_base_v1-0", "flux1"}) or any("text_encoder_2" in a.towers for a in several)
        for attachment in several:
            refuse(attachment, target, "kohya's LoRA files")
            for place, adapters in _by_place(attachment, target, numbered):
                name = place.names[0]
                if f"{name}.alpha" in tensors:
                    raise SaveError(
                        f"{target}: two attachments adapt '{name}', and the format holds one. Save them to two files."
                    )
                down, up, scaling = joined(place, adapters)
                tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
                tensors[f"{name}.alpha"] = torch.tensor(scaling * down.shape[0])
        if not tensors:
            raise SaveError(f"{target}: there is no attachment to save.")
        metadata = {"format": "pt", **_metadata(tensors, versions)}
        if provenance:
            metadata["provenance"] = json.dumps(dict(provenance))
        return write(target, tensors, metadata)


# reading


def _wanted(model: Any, file: File, options: Options) -> Wanted:
    """The lora attachment that gives the file's ΔW at every site.

    Raises:
        LoadError: keys of other things than LoRA, or modules that the model does not have.
    """
    refuse_others(file)
    known = {name: place for tower in towers_of(model) for place in places(tower) for name in place.names}
    modules, unused = grouped(file, file.tensors(finite=options.strict))
    found: dict[str, Found] = {}
    state: dict[str, Tensor] = {}
    for name, parts in modules.items():
        if name not in known or not _whole(parts):
            unused += [f"{name}.{part}" for part in parts]
            continue
        for site, pair in split(file, name, known[name], _pair(file, name, parts)):
            rank = pair.down.shape[0]
            found[site.name] = Found(site, rank, pair.scaling * rank)
            ones = (1,) * len(site.kernel)
            state[f"{site.name}:down"] = shaped(pair.down, (rank, *site.weight_shape[1:]))
            state[f"{site.name}:up"] = shaped(pair.up, (site.d_out, rank, *ones))
    if (unused and options.strict) or not found:
        raise LoadError(
            f"{file.path}: unused {len(unused)} of {len(file.shapes)} tensors: {', '.join(unused[:8])}. The model has no weights "
            "of these names, or they are no whole pairs: load it on the pipeline that it was made for, or pass strict=False."
        )
    silent = sum("alpha" not in parts for parts in modules.values())
    notes = [f"no alpha for {silent} of {len(modules)} modules: alpha = rank"] if silent else []
    return Wanted("lora", "lora", config_of(found), list(found), state, notes=notes, unused=unused)


def _layer(file: File, name: str, alpha: Tensor | None) -> Layer:
    others = [what for key in file.shapes if key.startswith(name + ".") and (what := other(key))]
    shape = file.shapes.get(f"{name}.{PARTS[0]}")
    rank = shape[0] if shape else None
    said = float(alpha) if alpha is not None and alpha.numel() == 1 else rank
    method = others[0] if others else "lora" if shape else "unknown"
    return Layer(name, method, rank, said, values(file, name + "."))


def other(key: str) -> str | None:
    """What a key is of that is no LoRA."""
    part = key.partition(".")[2]
    return next((what for start, what in OTHERS.items() if part.startswith(start)), None)


def refuse_others(file: File) -> None:
    """Raise if a key is of a change that is no LoRA: without it the rest would be another model."""
    for key in file.shapes:
        what = other(key)
        if what is not None:
            raise LoadError(
                f"{file.path}: '{key}' is {what}, not LoRA: without it the rest would be wrong, so nothing is loaded."
            )


def grouped(file: File, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Module to its parts, and keys that are no part of one."""
    modules: dict[str, dict[str, Tensor]] = {}
    unused: list[str] = []
    for key, tensor in tensors.items():
        part = next((p for p in PARTS if key.endswith("." + p)), None)
        if part is None:
            unused.append(key)
        else:
            modules.setdefault(key[: -len(part) - 1], {})[part] = tensor
    return modules, unused


def _whole(parts: Mapping[str, Tensor]) -> bool:
    """True if `down` and `up` are both there and have one rank."""
    down, up = (parts.get(part) for part in PARTS[:2])
    return down is not None and up is not None and min(down.ndim, up.ndim) > 1 and 0 < down.shape[0] == up.shape[1]


def _pair(file: File, name: str, parts: Mapping[str, Tensor]) -> Pair:
    down, up, mid = parts[PARTS[0]], parts[PARTS[1]], parts.get(PARTS[2])
    rank = down.shape[0]
    alpha = alpha_of(file, name, parts.get("alpha"), rank)
    if mid is not None:
        if mid.ndim < 3 or mid.shape[:2] != (rank, rank) or down.numel() != rank * down.shape[1]:
            raise LoadError(
                f"{file.path}: '{name}.lora_mid.weight' is {tuple(mid.shape)} between down {tuple(down.shape)} and up "
                f"{tuple(up.shape)}; expected ({rank}, {rank}, k, k) and 1×1. The file is damaged."
            )
        down = torch.einsum("ab...,bi->ai...", mid.double(), down.double().flatten(1)).to(torch.float32)
    return Pair(down, up, alpha / rank)


def alpha_of(file: File, name: str, tensor: Tensor | None, rank: int) -> float:
    """The alpha of a module; its rank where the file says none.

    Raises:
        LoadError: it is no single number, or 0, of which the tools make different things.
    """
    if tensor is None:
        return float(rank)
    if tensor.numel() != 1:
        raise LoadError(f"{file.path}: '{name}.alpha' has shape {tuple(tensor.shape)}; it must be one number. It is damaged.")
    if float(tensor) == 0:
        raise LoadError(
            f"{file.path}: '{name}.alpha' is 0, which sd-scripts take for the rank when they train and for no change when they "
            "merge. Write the alpha that is meant, or take it out for alpha = rank."
        )
    return float(tensor)


# writing


def _by_place(attachment: Attachment, target: Path, numbered: bool) -> list[tuple[Place, dict[str, Any]]]:
    """Each place that an attachment touches, with its adapters by site name."""
    towers = [dataclasses.replace(t, component=c) for c, m in attachment.towers.items() for t in towers_of(m)]
    known = {site.name: place for tower in towers for place in places(tower, numbered) for site in place.sites}
    found: dict[tuple[str, ...], tuple[Place, dict[str, Any]]] = {}
    for name, (site, adapter) in attachment.parts.items():
        place = known.get(name)
        if place is None:
            why = _why(site, attachment.towers[site.component], bool(known))
            raise SaveError(f"{target}: '{name}' {why}. Select other sites, or keep to the native file.")
        found.setdefault(place.names, (place, {}))[1][name] = adapter
    return list(found.values())


def _why(site: Any, tower: nn.Module, others: bool) -> str:
    """Why a site has no name in the layout."""
    if getattr(site, "kind", None) == "embedding":
        return "is an embedding, which the layout has no name for"
    if getattr(site, "groups", 1) != 1:
        return f"is a convolution in {site.groups} groups, of which each tool has another low-rank form"
    if getattr(site, "fused", False):
        return "is a fused projection, which the layout has only in slices. Select the slices, or unfuse before attaching"
    return f"is part of a {type(tower).__name__}, which the layout has no {'such ' if others else ''}names for"


def _metadata(tensors: Mapping[str, Tensor], versions: Collection[str]) -> dict[str, str]:
    """What sd-scripts write and other tools look for: the base's version, rank and alpha."""
    ranks = [t.shape[0] for key, t in tensors.items() if key.endswith(PARTS[0])]
    alphas = [float(t) for key, t in tensors.items() if key.endswith(".alpha")]
    common = [Counter(values).most_common(1)[0][0] for values in (ranks, alphas)]
    found = {"ss_network_module": "networks.lora", "ss_network_dim": str(common[0]), "ss_network_alpha": str(common[1])}
    if len(versions) == 1:
        (base,) = versions
        found |= {"ss_base_model_version": base, "ss_v2": str(base == "sd_v2")}
        found["ss_network_module"] += "_flux" if base == "flux1" else ""
    return found


save = Kohya().save

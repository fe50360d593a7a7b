"""`pytorch_lora_weights.safetensors`: LoRA and DoRA as diffusers and peft write them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.injection import Attachment, SaveError
from veneer.injection.sites import WeightSite

from ._core.attach import attach_all
from ._core.format import Format, LayerInfo, Options, pt_metadata
from ._core.lora_config import ENCODERS, component_of, reject_other_methods, reject_trained_base
from ._io.model_spec import DIFFUSERS, HASHES, model_spec
from ._io.reader import File
from ._io.writer import write
from ._names.modules import is_always_fused
from ._peft.codec import PeftAdapter
from ._peft.fused_slices import is_slice, merge_slices
from ._peft.low_rank import MAGNITUDE, A, B
from ._peft.tensors import DORA, LORA, layers, peft_specs

METADATA = "lora_adapter_metadata"


class Diffusers(Format):
    """`{component}.{path}.lora_A.weight` (r, d_in[, k, k]) and `…lora_B.weight` (d_out, r[, 1, 1]); ΔW = (alpha / r)·B A.

    Alpha is not stored as a tensor: the metadata `lora_adapter_metadata` holds peft's `LoraConfig` of every component, as JSON,
    and diffusers uses alpha = r if it is missing. rsLoRA, ranks and alphas by site are written as plain alphas and ranks of
    each module; CLIP paths are written with `text_model.`, which old and new diffusers accept.

    DoRA also has `….lora_magnitude_vector` (d_out) or (1, d_out, 1, 1); ai-toolkit calls it `….magnitude`. LoKr in peft's
    naming (`….lokr_w1`) and a per-module `….alpha`, as written by ai-toolkit and others, are also read; ΔW then follows the
    LyCORIS format.

    LoRA of slices of a layer that diffusers has only as a whole, `to_qkv_mlp_proj` in FLUX.2, is written as one LoRA of that
    layer, block by block.

    diffusers loads it into `unet`, `transformer` and the CLIP text encoders; its PixArt and DiT classes have no loader, but
    peft's `inject_adapter_in_model` takes the same tensors. Everything that it cannot hold (other methods, trained base
    parameters, T5, embeddings, grouped convolutions, projections fused by `fuse_qkv_projections`, DoRA of slices of a layer
    that diffusers has only as a whole) is rejected, never dropped.
    Source: diffusers 0.42 `loaders/lora_base.py`, `loaders/peft.py`; peft `LoraConfig`.
    """

    name: ClassVar[str] = "diffusers"
    file: ClassVar[str] = "pytorch_lora_weights.safetensors"

    def reads(self, file: File) -> bool:
        return any(".lora_A." in name or ".lokr_w" in name for name in file.shapes)

    def layers(self, file: File) -> list[LayerInfo]:
        return layers(file, file.json(METADATA))

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        return attach_all(model, file, peft_specs(model, file, file.json(METADATA), options), options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        tensors: dict[str, Tensor] = {}
        modules: dict[str, dict[str, tuple[int, float]]] = {}
        kinds: dict[str, str] = {}
        for attachment in attachments:
            kind = attachment.method.name
            if kind != "dora":
                reject_other_methods(attachment, target, "diffusers' LoRA files")
            reject_trained_base(attachment, target, "diffusers' LoRA files")
            for component, module, site, adapter in _parts(attachment, target):
                key = f"{component}.{_written_path(component, module)}"
                if f"{key}.lora_A.weight" in tensors:
                    message = f"{target}: two attachments adapt '{key}', but the format holds one. Save them to separate files."
                    raise SaveError(message, file=target, where=key, given=2, expected=1)
                if kinds.setdefault(component, kind) != kind:
                    message = f"{target}: '{component}' has lora and dora, but the format holds one of them per model."
                    raise SaveError(message, file=target, where=component, given=("lora", "dora"), expected=1)
                part = PeftAdapter(module, site, adapter, attachment.towers)
                found = (DORA if kind == "dora" else LORA).write(part)
                tensors |= {f"{key}.{_end(component, end)}": tensor for end, tensor in found.items()}
                rank = found[A].shape[0]
                modules.setdefault(component, {})[module] = (rank, adapter.scaling * rank)
            for owner, path, (down, up, scaling) in merge_slices(attachment) if kind == "lora" else ():
                component = owner or component_of(attachment.towers[owner])
                if kinds.setdefault(component, kind) != kind or f"{component}.{path}.{A}" in tensors:
                    message = f"{target}: two attachments adapt '{component}.{path}'. Save them to separate files."
                    raise SaveError(message, file=target, where=f"{component}.{path}", given=2, expected=1)
                tensors |= {f"{component}.{path}.{A}": down, f"{component}.{path}.{B}": up}
                modules.setdefault(component, {})[path] = (len(down), scaling * len(down))
        if not tensors:
            raise SaveError(f"{target}: no attachment to save.", file=target, given=0, expected=1)
        _check_recognizable(modules, target)
        config = {f"{c}.{k}": value for c, found in modules.items() for k, value in _config(c, found, kinds[c]).items()}
        metadata = {METADATA: json.dumps(config), **model_spec(attachments, provenance, DIFFUSERS)}
        return write(target, tensors, pt_metadata(provenance, metadata), HASHES)


def _parts(attachment: Attachment, target: Path) -> Iterator[tuple[str, str, Any, Any]]:
    """(component, module path, site, adapter) of every site but slices; raises for a site that the format cannot hold."""
    for site, adapter in attachment.parts.values():
        tower = attachment.towers[site.component]
        component = site.component or component_of(tower)
        if attachment.method.name == "lora" and component and is_slice(site):
            continue  # written with the other slices of its layer
        path = site.name.removeprefix(site.component + ".") if site.component else site.name
        wrong = _explain(site, tower, component, path)
        if wrong:
            message = f"{target}: '{site.name}' {wrong[1]}. Select other sites, or use the native format."
            raise SaveError(message, file=target, where=site.name, given=wrong[0])
        yield component, path, site, adapter


def _explain(site: Any, tower: nn.Module, component: str, path: str) -> tuple[str, str] | None:
    """Why diffusers has no name for a site: one word, and a phrase for the message."""
    name = type(tower).__name__
    if not component:
        return name, f"is part of a {name}, which is not part of a diffusers pipeline"
    if type(tower).__module__.startswith("transformers.") and name not in ENCODERS:
        return name, f"is part of a {name}, into which diffusers cannot load LoRA"
    if not isinstance(site, WeightSite) or site.kind == "embedding":
        return "embedding", "is an embedding, into which diffusers cannot load LoRA"
    if site.groups != 1:
        return "groups", f"is a convolution with {site.groups} groups, for which peft uses another low-rank form"
    if is_slice(site):
        return "slice", f"is a slice of '{site.path}', which diffusers has only as a whole: its DoRA has another norm"
    if (site.fused and not is_always_fused(site)) or not isinstance(
        _module(tower, path), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    ):
        why = "is a fused projection, which diffusers has only after fuse_qkv_projections(). Unfuse before attaching"
        return "fused", why
    return None


def _check_recognizable(modules: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """Raises for a text encoder without an adapted attention projection, by which diffusers recognizes the format."""
    for component, paths in modules.items():
        if component.startswith("text_encoder") and not any(".self_attn." in path for path in paths):
            raise SaveError(
                f"{target}: '{component}' is adapted only outside its attention, but diffusers recognizes a text encoder's LoRA "
                "by its attention projections. Select attn as well, or use the native format.",
                file=target,
                where=component,
                given=tuple(paths),
                expected="attn",
            )


def _module(tower: nn.Module, path: str) -> nn.Module | None:
    try:
        return tower.get_submodule(path)
    except AttributeError:
        return None


def _end(component: str, end: str) -> str:
    """Key suffix. transformers 5, which loads text encoders for diffusers, drops magnitude keys that do not end in `.weight`."""
    return f"{end}.weight" if end == MAGNITUDE and component.startswith("text_encoder") else end


def _written_path(component: str, path: str) -> str:
    """CLIP's layers under `text_model.`, also if the installed transformers has no such level."""
    inside = component.startswith("text_encoder") and not path.startswith(("text_model.", "text_projection"))
    return f"text_model.{path}" if inside else path


def _config(component: str, modules: Mapping[str, tuple[int, float]], kind: str) -> dict[str, Any]:
    """peft's LoraConfig: the most common rank and alpha, and patterns for the others.

    peft matches a pattern, a regular expression, with the end of a module's path; `^` anchors it to the beginning. CLIP paths
    may begin with `text_model.`, and their suffixes are unique.
    """
    text = component.startswith("text_encoder")
    short = {path: path.removeprefix("text_model.") if text else path for path in modules}
    pattern = {path: name if text else f"^{name}" for path, name in short.items()}
    rank = Counter(r for r, _ in modules.values()).most_common(1)[0][0]
    alpha = Counter(a for _, a in modules.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern[p]: r for p, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {pattern[p]: a for p, (_, a) in modules.items() if a != alpha},
        "target_modules": list(short.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": kind == "dora",
    }


save = Diffusers().save

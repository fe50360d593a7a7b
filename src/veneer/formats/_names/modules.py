"""Module names of a model's original release, which most tools use for their layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from veneer.injection.sites import Site, WeightSite
from veneer.injection.towers import Tower

from .._core.lora_config import ENCODERS
from .ldm import RESNET
from .transformers import names_of

OUTER_LAYERS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
T5 = "T5EncoderModel"


@dataclass(frozen=True)
class OriginalModule:
    """One module of an original release.

    Args:
        path: dotted, in that release. `own`: its path in diffusers or transformers, or None if fused.
        sites: the weights that make up its output rows, in order; one for most modules, several for a fused projection.
        swapped: the halves of the rows are swapped (scale and shift of an adaptive norm before the last layer).
        spellings: further spellings of `path` in files.
    """

    path: str
    own: str | None
    sites: tuple[WeightSite, ...]
    swapped: bool = False
    spellings: tuple[str, ...] = ()


def original_modules(tower: Tower) -> list[OriginalModule]:
    """Every module of a tower that LoRA can adapt, under its original name; empty if the original names are unknown."""
    sites, model, kind = weight_paths(tower), tower.module, type(tower.module).__name__
    if (record := names_of(model)) is not None:
        return [
            OriginalModule(
                path, own[0] if len(own) == 1 else None, tuple(sites[p] for p in own), swapped, record.other_spellings(path)
            )
            for path, (own, swapped) in record.names(model).items()
            if all(p in sites for p in own)
        ]
    if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        return [OriginalModule(path, own, (sites[own],)) for own, path in _unet_names(model, sites)]
    if kind in ENCODERS or kind == T5:
        inside = {p: p if kind == T5 or p.startswith("text_projection") else f"text_model.{p}" for p in sites}
        return [OriginalModule(inside[p], inside[p], (s,)) for p, s in sites.items()]
    return []


def sliced_modules(tower: Tower, names: Iterable[OriginalModule] | None = None) -> list[OriginalModule]:
    """The modules whose slices are sites: the slices of each, if they are all of its rows.

    Args:
        names: modules under the names of the format (default: under their original names).
    """
    slices, modules = slices_by_layer(tower.sites), []
    for module in original_modules(tower) if names is None else names:
        layer = module.sites[0]
        parts = slices.get((layer.component, layer.path), ())
        if layer.fused and sum(site.d_out for site in parts) == layer.d_out:
            modules.append(replace(module, sites=parts))
    return modules


def slices_by_layer(sites: Iterable[Site]) -> dict[tuple[str, str], tuple[WeightSite, ...]]:
    """(component, path) of each layer that has slices as sites to these, in the order of their rows."""
    layers: dict[tuple[str, str], list[WeightSite]] = {}
    for site in sites:
        if isinstance(site, WeightSite) and site.rows is not None:
            layers.setdefault((site.component, site.path), []).append(site)
    return {layer: tuple(sorted(slices, key=lambda site: site.rows or ())) for layer, slices in layers.items()}


def diffusers_modules(tower: Tower) -> list[OriginalModule]:
    """Every module of a diffusion transformer with known original names, under its path in diffusers."""
    if names_of(tower.module) is None:
        return []
    return [OriginalModule(path, path, (site,)) for path, site in weight_paths(tower).items()]


def weight_paths(tower: Tower) -> dict[str, WeightSite]:
    """Path in diffusers or transformers, without `text_model.`, of every weight that LoRA of any tool can adapt.

    Excludes grouped convolutions, whose low-rank form differs between tools. Of a fused projection, the whole weight is listed
    if the model always has it, else its slices.
    """
    weights = [s for s in tower.sites if isinstance(s, WeightSite)]
    return {_path(tower, s): s for s in weights if s.kind != "embedding" and s.groups == 1 and _is_module(s)}


def is_always_fused(site: WeightSite) -> bool:
    """True for a fused projection, or a slice of one, that is not the result of `fuse_qkv_projections`, which has a guard."""
    return site.guard is None and (site.fused or site.rows is not None)


def _is_module(site: WeightSite) -> bool:
    """True if a site has a module of this path in an unfused model."""
    return site.fused or site.rows is None if is_always_fused(site) else not site.fused


def _path(tower: Tower, site: WeightSite) -> str:
    path = site.name.removeprefix(tower.component + ".") if tower.component else site.name
    return path.removeprefix("text_model.")


def original_names(unet: nn.Module, names: Collection[str]) -> dict[str, str]:
    """diffusers' name of each UNet tensor -> name in the original release, which may be the same."""
    found = dict(_unet_names(unet, {name.rpartition(".")[0] for name in names}))
    return {name: f"{found[module]}.{end}" for name in names for module, _, end in [name.rpartition(".")]}


def _unet_names(model: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """diffusers' path of each module and that of the original release (`input_blocks.4.1.…`), which may be the same."""
    blocks = _original_blocks(model)
    for path in paths:
        block = next((b for b in blocks if path == b or path.startswith(b + ".")), None)
        inside = "" if block is None else _inside(block, path[len(block) + 1 :])
        yield path, path if block is None else ".".join(filter(None, (blocks[block], inside)))


def _inside(block: str, rest: str) -> str:
    if ".resnets." in block:
        return RESNET.get(rest, rest)
    return "op" if ".downsamplers." in block else rest


def _original_blocks(model: nn.Module) -> dict[str, str]:
    """diffusers' path of every block -> that of the original release, which numbers blocks across levels."""
    unet: Any = model
    found, number = dict(OUTER_LAYERS), 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            found[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            found[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers is not None:
            found[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{number}.0"
            number += 1
    found |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            found[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            found[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers is not None:  # belongs to the last entry of its level
            found[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{number - 1}.{2 if hasattr(block, 'attentions') else 1}"
    return found

"""How modules were called in the first release of a model: what most tools name their layers after."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.injection.sites import WeightSite
from veneer.injection.towers import Tower

from .._core.lora_config import ENCODERS
from .ldm import RESNET
from .transformer import flux, pixart, sd3

OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
TRANSFORMERS = {"FluxTransformer2DModel": flux, "SD3Transformer2DModel": sd3, "PixArtTransformer2DModel": pixart}
T5 = "T5EncoderModel"


@dataclass(frozen=True)
class Module:
    """One module of a first release.

    Args:
        path: dotted, in that release. `own`: its path in diffusers or transformers, or None for a fused one.
        sites: the weights that its output rows are, in order; one for most, several for a fused projection.
        swapped: the halves of the rows are the other way round (scale and shift of an adaptive norm before the last layer).
    """

    path: str
    own: str | None
    sites: tuple[WeightSite, ...]
    swapped: bool = False


def modules(tower: Tower) -> list[Module]:
    """Every module of a tower that LoRA can change, as in its first release; none where that is not known."""
    sites, model, kind = paths(tower), tower.module, type(tower.module).__name__
    if kind in TRANSFORMERS:
        found = TRANSFORMERS[kind](model).items()
        return [
            Module(path, own[0] if len(own) == 1 else None, tuple(sites[p] for p in own), swapped)
            for path, (own, swapped) in found
            if all(p in sites for p in own)
        ]
    if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        return [Module(path, own, (sites[own],)) for own, path in _unet(model, sites)]
    if kind in ENCODERS or kind == T5:
        inside = {p: p if kind == T5 or p.startswith("text_projection") else f"text_model.{p}" for p in sites}
        return [Module(inside[p], inside[p], (s,)) for p, s in sites.items()]
    return []


def paths(tower: Tower) -> dict[str, WeightSite]:
    """Path in diffusers or transformers, without `text_model.`, of every weight that LoRA of any tool can change.

    Grouped convolutions have another low-rank form in each tool.
    """
    weights = [s for s in tower.sites if isinstance(s, WeightSite)]
    return {_path(tower, s): s for s in weights if s.kind != "embedding" and s.groups == 1 and not s.fused}


def _path(tower: Tower, site: WeightSite) -> str:
    path = site.name.removeprefix(tower.component + ".") if tower.component else site.name
    return path.removeprefix("text_model.")


def first_release(unet: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Name of each tensor of a UNet in diffusers to that in its first release, which may be the same."""
    found = dict(_unet(unet, {name.rpartition(".")[0] for name in names}))
    return {name: f"{found[module]}.{end}" for name in names for module, _, end in [name.rpartition(".")]}


def _unet(model: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """diffusers' path of each module and that of the first release (`input_blocks.4.1.…`), which may be the same."""
    blocks = _first_release(model)
    for path in paths:
        block = next((b for b in blocks if path == b or path.startswith(b + ".")), None)
        inside = "" if block is None else _inside(block, path[len(block) + 1 :])
        yield path, path if block is None else ".".join(filter(None, (blocks[block], inside)))


def _inside(block: str, rest: str) -> str:
    if ".resnets." in block:
        return RESNET.get(rest, rest)
    return "op" if ".downsamplers." in block else rest


def _first_release(model: nn.Module) -> dict[str, str]:
    """diffusers' path of every block to that of the first release, which counts through the levels."""
    unet: Any = model
    found, number = dict(OUTSIDE), 1
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
        if block.upsamplers is not None:  # the last in the list of its level's last entry
            found[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{number - 1}.{2 if hasattr(block, 'attentions') else 1}"
    return found

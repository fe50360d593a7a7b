"""How kohya's layout names weights: dots become underscores, and some models are named as in their first release."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..injection.sites import WeightSite
from ..injection.towers import Tower
from ._lora import ENCODERS

RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": QKV, "img_attn.proj": ("attn.to_out.0",), "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",), "txt_attn.qkv": ADDED, "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",), "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
SINGLE = {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)}
EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
LAST = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True)
class Place:
    """One module of the layout.

    Args:
        names: its spellings, without a part such as `.alpha`; the first is the one that is written.
        sites: the weights that its output rows are, in order; one for most, several for a fused projection.
        swapped: the halves of the rows are the other way round (FLUX's last adaptive norm: shift and scale).
    """

    names: tuple[str, ...]
    sites: tuple[WeightSite, ...]
    swapped: bool = False


def places(tower: Tower, numbered: bool = False) -> list[Place]:
    """Every place that the layout has for a tower; none where no tool writes it for such a model.

    Args:
        numbered: the first text encoder is written as `lora_te1`, one of several, and not as `lora_te`.
    """
    sites = {_path(tower, s): s for s in tower.sites if isinstance(s, WeightSite) and _plain(s)}
    model: Any = tower.module
    kind = type(model).__name__
    if kind == "FluxTransformer2DModel":
        return list(_flux(model, sites))
    if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        return [Place(_spelt(("lora_unet",), names), (sites[path],)) for path, names in _unet(model, sites).items()]
    if kind in ENCODERS or kind == "T5EncoderModel":
        inside = {path: path if path.startswith("text_projection") else f"text_model.{path}" for path in sites}
        t5 = kind == "T5EncoderModel"
        return [Place(_spelt(_encoder(tower, numbered), (p if t5 else inside[p],)), (s,)) for p, s in sites.items()]
    return []


def version(model: nn.Module) -> str | None:
    """What sd-scripts call the base of a denoiser: `sd_v1`, `sd_v2`, `sdxl_base_v1-0` or `flux1`; None for other models."""
    config: Any = getattr(model, "config", {})
    if type(model).__name__ == "FluxTransformer2DModel":
        return "flux1"
    if not hasattr(model, "down_blocks"):
        return None
    if config.get("addition_embed_type") == "text_time":
        return "sdxl_base_v1-0"
    return "sd_v2" if config.get("use_linear_projection") else "sd_v1"


def _path(tower: Tower, site: WeightSite) -> str:
    path = site.name.removeprefix(tower.component + ".") if tower.component else site.name
    return path.removeprefix("text_model.")


def _plain(site: WeightSite) -> bool:
    """Weights that LoRA of any tool can change. Grouped convolutions have another low-rank form in each."""
    return site.kind != "embedding" and site.groups == 1 and not site.fused


def _spelt(prefixes: tuple[str, ...], paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}_{path.replace('.', '_')}" for path in paths for prefix in prefixes)


def _encoder(tower: Tower, numbered: bool) -> tuple[str, ...]:
    """`lora_te` of a model with one text encoder, else numbered. FLUX's T5 is the third for sd-scripts, the second for others."""
    component = tower.component or ENCODERS.get(type(tower.module).__name__, "")
    if type(tower.module).__name__ == "T5EncoderModel":
        return ("lora_te3", "lora_te2") if component == "text_encoder_2" else ("lora_te3",)
    if component == "text_encoder":
        return ("lora_te1", "lora_te") if numbered else ("lora_te", "lora_te1")
    return (f"lora_te{component.rpartition('_')[2]}",)


def _unet(model: nn.Module, sites: Mapping[str, WeightSite]) -> dict[str, tuple[str, ...]]:
    """Path to its spellings: diffusers' own and that of the first release (`input_blocks.4.1.…`), the written one first."""
    blocks, first = _first_release(model), version(model) == "sdxl_base_v1-0"
    found: dict[str, tuple[str, ...]] = {}
    for path in sites:
        block = next((b for b in blocks if path == b or path.startswith(b + ".")), None)
        if block is None:
            found[path] = (path,)
        else:
            older = ".".join(filter(None, (blocks[block], _inside(block, path[len(block) + 1 :]))))
            found[path] = (older, path) if first else (path, older)
    return found


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


def _flux(model: nn.Module, sites: Mapping[str, WeightSite]) -> Iterator[Place]:
    """FLUX.1 as in its first release: fused projections, and the image's stream before the text's."""
    flux: Any = model
    names: dict[str, tuple[str, ...]] = {}
    for i in range(len(flux.transformer_blocks)):
        names |= {f"double_blocks.{i}.{n}": _below(f"transformer_blocks.{i}", p) for n, p in DOUBLE.items()}
    for i in range(len(flux.single_transformer_blocks)):
        names |= {f"single_blocks.{i}.{n}": _below(f"single_transformer_blocks.{i}", p) for n, p in SINGLE.items()}
    for name, embedder in EMBEDDERS.items():
        names[f"{name}.in_layer"] = (f"time_text_embed.{embedder}.linear_1",)
        names[f"{name}.out_layer"] = (f"time_text_embed.{embedder}.linear_2",)
    names |= {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "final_layer.linear": ("proj_out",),
        LAST: ("norm_out.linear",),
    }
    for name, paths in names.items():
        if all(path in sites for path in paths):
            yield Place(_spelt(("lora_unet",), (name,)), tuple(sites[path] for path in paths), swapped=name == LAST)


def _below(block: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.{path}" for path in paths)

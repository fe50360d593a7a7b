"""Files of tiny control networks, in diffusers' layout and in the original ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from tests.formats import test_controlnext, test_ip_adapter, test_t2i_adapter
from tests.formats.malformed import guide_meanings
from tests.formats.malformed.good_files import Good, files_in, written
from tests.formats.malformed.guide_meanings import HINT, NET, Shape, by_authors, counted, of_pictures
from tests.formats.malformed.models import base, model
from veneer.formats._names.ldm import ldm_names

ENDS = ("weight", "bias")
STAGES: dict[str, Shape] = {  # sides of a hint encoder's convolutions; a to d: widths of its stages
    "conv_in": ("a", "channels"), "blocks.0": ("a", "a"), "blocks.1": ("b", "a"), "blocks.2": ("b", "b"), "blocks.3": ("c", "b"),
    "blocks.4": ("c", "c"), "blocks.5": ("d", "c"), "conv_out": (8, "d"),
}  # fmt: skip
HINTS = {f"{HINT}.{name}.{end}": sides if end == "weight" else sides[:1] for name, sides in STAGES.items() for end in ENDS}
PICTURES: dict[str, Shape] = {
    "image_proj.proj.weight": ("rows", "width"), "image_proj.proj.bias": ("rows",), "image_proj.latents": (1, "tokens"),
    "image_proj.proj_in.weight": (test_ip_adapter.DIM, "width"),
}  # fmt: skip


def good_guides(folder: Path) -> list[Good]:
    """All of them. `folder`: where they are saved."""
    return [*_controlnets(folder), *_t2i_adapters(folder), *_ip_adapters(folder), *_controlnexts(folder)]


def _drawn(shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {key: torch.randn(tuple(shape), generator=generator) * 0.3 for key, shape in shapes.items()}


def _shapes(tensors: Mapping[str, Tensor], told: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes required by the model. `told`: first dimensions given by the file, by the ends of names."""
    found: dict[str, Shape] = {key: tuple(t.shape) for key, t in tensors.items()}
    for key, shape in found.items():
        first: Shape = next((sides for end, sides in told.items() if key.endswith(end)), ())
        found[key] = (*first, *shape[len(first) :])
    return found


def _saved(name: str, format: str, kind: str, made: Any, place: Path, meaning: Any) -> Good:
    """A folder by diffusers' own class."""
    made.save_pretrained(place)
    return Good(name, format, kind, files_in(place), meaning, base(kind))


def _controlnets(folder: Path) -> Iterator[Good]:
    for name, kind, order, channels in (("controlnet", "sd1", "rgb", 3), ("controlnet-bgr", "sdxl", "bgr", 4)):
        made: Any = ControlNetModel.from_unet(model(kind), order, (4, 4, 6, 6), conditioning_channels=channels)
        tensors = _drawn({key: t.shape for key, t in made.state_dict().items()})
        made.load_state_dict(tensors)
        shapes = _shapes(tensors, HINTS)
        means = guide_meanings.controlnet({key: [NET + key] for key in tensors}, shapes, dict(made.config))
        yield _saved(name, "controlnet", kind, made, folder / name, means)
        for prefix in ("control_model.", "") if kind == "sd1" else ():
            theirs = {prefix + key: own for own, key in ldm_names(tensors).items()}
            places = {key: [NET + by_authors(key.removeprefix(prefix))] for key in theirs}
            means = guide_meanings.controlnet(places, {key: shapes[own] for key, own in theirs.items()}, {})
            own = {key: tensors[own] for key, own in theirs.items()}
            name = f"controlnet-authors{'-plain' * (not prefix)}"
            yield written(name, "controlnet", kind, own, folder / name, means, base(kind))


def _t2i_adapters(folder: Path) -> Iterator[Good]:
    for type_, blocks, channels in (("full_adapter", 2, 3), ("light_adapter", 4, 1), ("full_adapter_xl", 3, 3)):
        kind, form = test_t2i_adapter.TYPES[type_][0], type_.partition("_")[0]
        made = test_t2i_adapter.adapter(type_, num_res_blocks=blocks, in_channels=channels)
        of: Any = {"kind": form, "type_": type_, "factor": made.config.downscale_factor}
        tensors = made.state_dict()
        first: dict[str, Shape] = {"conv_in.weight": (8, "in")} if form == "full" else {"body.0.in_conv.weight": (2, "in")}
        places = {key: ["residuals:" + key.removeprefix("adapter.")] for key in tensors}
        means = guide_meanings.t2i_adapter(places, _shapes(tensors, first), **of)
        name = f"t2i-{type_}"
        yield _saved(name, "t2i_adapter", kind, made, folder / name, means)
        if kind == "sd1":
            theirs = test_t2i_adapter.by_the_authors(made, type_, blocks)
            places = {key: ["residuals:" + counted(key, form, blocks)] for key in theirs}
            means = guide_meanings.t2i_adapter(places, _shapes(theirs, first), **of)
            yield written(f"{name}-authors", "t2i_adapter", kind, theirs, folder / f"{name}-authors", means, base(kind))


def _ip_adapters(folder: Path) -> Iterator[Good]:
    for name, kind, form, tokens in (
        ("ip-base", "sd1", "base", 4), ("ip-base-tokens", "sd1", "base", 3), ("ip-plus", "sdxl", "plus", 4),
    ):  # fmt: skip
        unet = model(kind)
        tensors = _drawn(test_ip_adapter.sizes(unet, form, tokens))
        layers = [name for name in unet.attn_processors if "attn2" in name]
        shapes = _shapes(tensors, PICTURES)
        means = guide_meanings.ip_adapter(of_pictures(tensors, layers), shapes, unet.config.cross_attention_dim)
        yield written(name, "ip_adapter", kind, tensors, folder / name, means, base(kind))


def _controlnexts(folder: Path) -> Iterator[Good]:
    for name, kind, usual, meta in (
        ("controlnext", "sd1", "block", {}), ("controlnext-place", "sdxl", "stem", {"place": "block"}),
        ("controlnext-stem", "sd1", "block", {"place": "stem", "revision": "2"}),
    ):  # fmt: skip
        flat = test_controlnext.state(8)
        tensors = {key: t.half() if t.numel() > 10_000 else t for key, t in flat.items()}  # half a file for the same layers
        means = guide_meanings.controlnext(
            {key: [f"residuals:{key}"] for key in tensors}, _shapes(tensors, {"embedding.0.weight": (64, "channels")}), usual
        )
        yield written(name, "controlnext", kind, tensors, folder / name, means, base(kind), **meta)

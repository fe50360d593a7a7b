"""Reference reading of files of control networks: the attachment's name of each tensor, and its options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tests.formats.malformed.bytes_read import Array, Bytes, parsed, require
from tests.formats.malformed.meanings import Base, Files, Meaning, told

Places = Mapping[str, Sequence[str]]  # name of a tensor to the attachment's own names for it
Shape = tuple[int | str, ...]  # a text: a side that the file tells, everywhere the same
HINT, NET = "controlnet_cond_embedding", "residuals:net."
# modules of a ControlNet of three levels with one layer each: the authors' names, and diffusers'
BLOCKS = {
    "input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.1.0": "down_blocks.0.resnets.0", "input_blocks.1.1": "down_blocks.0.attentions.0",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.3.0": "down_blocks.1.resnets.0", "input_blocks.3.1": "down_blocks.1.attentions.0",
    "input_blocks.4.0.op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks.5.0": "down_blocks.2.resnets.0", "input_blocks.5.1": "down_blocks.2.attentions.0",
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1", "middle_block_out.0": "controlnet_mid_block",
    "input_hint_block.0": f"{HINT}.conv_in", "input_hint_block.14": f"{HINT}.conv_out",
    **{f"input_hint_block.{2 * i + 2}": f"{HINT}.blocks.{i}" for i in range(6)},
    **{f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(6)},
}  # fmt: skip
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
# options of each method that its files tell
# what a config may say of anything: it is of no consequence, or the tensors tell it
OPTIONS = {
    "controlnet": ("channels", "hint"), "t2i_adapter": ("kind", "channels", "blocks"), "controlnext": ("channels", "place"),
    "ip_adapter": ("kind", "width", "tokens", "depth", "dim"),
}  # fmt: skip
FREE = (
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "upcast_attention",
    "controlnet_conditioning_channel_order",
)


def by_authors(name: str) -> str:
    """diffusers' name for a tensor of a ControlNet under its original name."""
    block = max((b for b in BLOCKS if name.startswith(b + ".")), key=len)
    rest, end = name.removeprefix(block + ".").rpartition(".")[::2]
    return ".".join(part for part in (BLOCKS[block], RESNET.get(rest, rest), end) if part)


def counted(name: str, kind: str, blocks: int) -> str:
    """Our name for a tensor of a T2I-Adapter under its original name."""
    if kind == "light":
        return re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", name)
    for level in range(3):
        for i in range(blocks):
            start = f"body.{level * blocks + i}."
            if name.startswith(start):
                rest = name.removeprefix(start)
                return f"body.{level}.{rest}" if rest.startswith("in_conv") else f"body.{level}.resnets.{i}.{rest}"
    return name


def of_pictures(keys: Iterable[str], layers: Sequence[str]) -> dict[str, list[str]]:
    """Our names for the tensors of an IP-Adapter. `layers`: names of all cross-attentions, in the order of the processors."""
    found: dict[str, list[str]] = {}
    for key in keys:
        group, _, rest = key.partition(".")
        number, _, end = rest.partition(".")
        shared = group == "image_proj"
        found[key] = [f"{n}:shared.{rest}" for n in layers] if shared else [f"{layers[int(number) // 2]}:{end}"]
    return found


def landed(files: Files, places: Places, shapes: Mapping[str, Shape], layer: str = "$") -> tuple[Bytes, Meaning]:
    """The file, and the values of each tensor under the attachment's own names: all of them, and nothing else.

    Args:
        layer: pattern with the number of a layer, of which there may be fewer.
    """
    file = Bytes(next(iter(files.values())))
    numbers = {key: int(m[1]) for key in places if (m := re.match(layer, key)) and m.re.groups}
    least = min((number for key, number in numbers.items() if key not in file.arrays), default=1000)
    require(file.arrays.keys() == {key for key in places if numbers.get(key, 0) < least} and least > 0, "other tensors")
    found: Meaning = {}
    sides: dict[int | str, int] = {}
    for key in file.arrays:
        array = file.weight(key)
        require(array.ndim == len(shapes[key]) and array.size, f"{key} has other sides")
        for side, want in zip(array.shape, shapes[key], strict=True):
            require(side == (want if isinstance(want, int) else sides.setdefault(want, side)), f"{key} has another shape")
        found.update(dict.fromkeys(places[key], array))
    return file, found


def config_of(files: Files, kind: str) -> dict[str, Any]:
    """Values of a config; empty if there is none."""
    config = parsed(files["config.json"], False) if "config.json" in files else {}
    require(isinstance(config, dict) and config.get("_class_name", kind) == kind, "another network")
    found: dict[str, Any] = config
    return found


def same(value: Any, other: Any) -> bool:
    """The same for each of the three levels; one value stands for all."""
    one, two = ([*v] if isinstance(v, (list, tuple)) else [v] * 3 for v in (value, other))
    return one == two and [type(v) is bool for v in one] == [type(v) is bool for v in two]


def controlnet(places: Places, shapes: Mapping[str, Shape], network: Mapping[str, Any]) -> Callable[[Files, Base], Meaning]:
    """`network`: the config of the model's down blocks, which no config may contradict."""

    def meaning(files: Files, base: Base) -> Meaning:
        _, found = landed(files, places, shapes)
        config = config_of(files, "ControlNetModel")
        require(not config.get("global_pool_conditions"), "averaged features")
        for key in config.keys() & network.keys() - {*FREE, "global_pool_conditions"}:
            require(key.startswith("_") or same(config[key], network[key]), f"another network: {key}")
        order, first = config.get("controlnet_conditioning_channel_order", "rgb"), f"{NET}{HINT}.conv_in.weight"
        require(order in ("rgb", "bgr"), "an order")
        widths = [found[first].shape[0]] + [found[f"{NET}{HINT}.blocks.{i}.weight"].shape[0] for i in (1, 3, 5)]
        found |= told("controlnet", channels=found[first].shape[1], hint=widths)
        return {**found, first: found[first][:, ::-1]} if order == "bgr" else found

    return meaning


def t2i_adapter(
    places: Places, shapes: Mapping[str, Shape], kind: str, type_: str, factor: int
) -> Callable[[Files, Base], Meaning]:
    """`type_`, `factor`: diffusers' type of an adapter for the model, and its unshuffling."""
    usual, layer = {"full": 2, "light": 4}[kind], r"(?:adapter\.)?body\.\d+\.(?:resnets|body)\.(\d+)\."

    def meaning(files: Files, base: Base) -> Meaning:
        _, found = landed(files, places, shapes, layer)
        config = config_of(files, "T2IAdapter")
        named, reduced = config.get("adapter_type"), config.get("downscale_factor", factor)
        require(named in (None, type_) and reduced == factor and type(reduced) is not bool, "another family")
        first = found["residuals:conv_in.weight" if kind == "full" else "residuals:body.0.in_conv.weight"]
        channels, left = divmod(first.shape[1], factor**2)
        require(channels and not left and (channels <= 4 or "downscale_factor" in config), "channels")
        blocks = len({m[1] for name in found if (m := re.match(r"residuals:body\.0\.resnets\.(\d+)\.", name))})
        return found | told("t2i_adapter", kind=kind, channels=channels, blocks=0 if blocks == usual else blocks)

    return meaning


def ip_adapter(places: Places, shapes: Mapping[str, Shape], context: int) -> Callable[[Files, Base], Meaning]:
    """`context`: width of the text tokens, and so of the image tokens."""

    def meaning(files: Files, base: Base) -> Meaning:
        file, found = landed(files, places, shapes, r"image_proj\.layers\.(\d+)\.")
        parts = {key.removeprefix("image_proj."): t for key, t in file.arrays.items() if key.startswith("image_proj.")}
        return found | told("ip_adapter", **_tokens(parts, context))

    return meaning


def _tokens(parts: Mapping[str, Array], context: int) -> dict[str, Any]:
    """The options of an IP-Adapter, by the module that computes the image tokens."""
    if "latents" not in parts:
        rows, width = parts["proj.weight"].shape
        require(rows % context == 0, "tokens")
        return {"kind": "base", "width": width, "tokens": 0 if rows == 4 * context else rows // context, "depth": 4, "dim": 0}
    dim, width = parts["proj_in.weight"].shape
    depth = len({name.split(".")[1] for name in parts if name.startswith("layers.")})
    own = 0 if dim == min(context, 1280) else dim
    return {"kind": "plus", "width": width, "tokens": parts["latents"].shape[1], "depth": depth, "dim": own}


def controlnext(places: Places, shapes: Mapping[str, Shape], usual: str) -> Callable[[Files, Base], Meaning]:
    """`usual`: the block where the feature is added in the model's family."""

    def meaning(files: Files, base: Base) -> Meaning:
        file, found = landed(files, places, shapes)
        place = file.metadata.get("place", usual)
        require(place in ("block", "stem"), "a place")
        revision = file.metadata.get("revision", "1") if "place" in file.metadata else "2"
        require(revision == "2" or (revision == "1" and place == "block"), "a revision")
        return found | told("controlnext", channels=found["residuals:embedding.0.weight"].shape[1], place=place)

    return meaning

"""Maps diffusers' names of a ControlNet to those of the original code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
FIXED = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0", "class_embedding.linear_2": "label_emb.0.2",
    "controlnet_mid_block": "middle_block_out.0", "controlnet_cond_embedding.conv_in": "input_hint_block.0",
}  # fmt: skip
DOWN = re.compile(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)")
ZERO = re.compile(r"controlnet_down_blocks\.(\d+)\.(.*)")
HINT = re.compile(r"controlnet_cond_embedding\.(?:blocks\.(\d+)|conv_out)\.(.*)")


def ldm_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name -> original name, for all tensors of one network.

    A down block with n resnets is `input_blocks.{first}` to `{first + n}`, where `0` is the resnet and `1` the attention; the
    last holds only the downsampler. The resnets and attentions of the middle block alternate.
    """
    ordered = list(names)
    layers: dict[int, int] = {}
    hints = 0
    for name in ordered:
        if (m := DOWN.fullmatch(name)) and m[2] == "resnets":
            layers[int(m[1])] = max(layers.get(int(m[1]), 0), int(m[3]) + 1)
        if (m := HINT.fullmatch(name)) and m[1]:
            hints = max(hints, int(m[1]) + 1)
    starts = list(accumulate((layers[b] + 1 for b in sorted(layers)), initial=1))
    return {name: _name(name, starts, layers, hints) for name in ordered}


def _name(name: str, starts: list[int], layers: dict[int, int], hints: int) -> str:
    if m := DOWN.fullmatch(name):
        block, layer, rest = int(m[1]), int(m[3]), m[4]
        if m[2] == "downsamplers":
            return f"input_blocks.{starts[block] + layers[block]}.0.op.{rest.removeprefix('conv.')}"
        at = f"input_blocks.{starts[block] + layer}"
        return f"{at}.0.{_resnet(rest)}" if m[2] == "resnets" else f"{at}.1.{rest}"
    if m := MIDDLE.fullmatch(name):
        layer = 2 * int(m[2])
        return f"middle_block.{layer}.{_resnet(m[3])}" if m[1] == "resnets" else f"middle_block.{layer + 1}.{m[3]}"
    if m := ZERO.fullmatch(name):
        return f"zero_convs.{m[1]}.0.{m[2]}"
    if m := HINT.fullmatch(name):
        return f"input_hint_block.{2 * (int(m[1]) if m[1] else hints) + 2}.{m[2]}"
    module, _, end = name.rpartition(".")
    return f"{FIXED.get(module, module)}.{end}"


def _resnet(rest: str) -> str:
    module, _, end = rest.rpartition(".")
    return f"{RESNET.get(module, module)}.{end}"

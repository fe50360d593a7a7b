"""Roles of layers and free parameters, by the names and classes around them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from .._timm import layer_role

ATTENTION = {
    **dict.fromkeys(("q", "query", "to_q", "q_proj", "wq", "queries"), "attn.q"),
    **dict.fromkeys(("k", "key", "to_k", "k_proj", "wk", "keys"), "attn.k"),
    **dict.fromkeys(("v", "value", "to_v", "v_proj", "wv", "values"), "attn.v"),
    **dict.fromkeys(("qkv", "to_qkv", "in_proj", "qkvs"), "attn.qkv"),
    **dict.fromkeys(("kv", "to_kv"), "attn.kv"),
    **dict.fromkeys(("proj", "out", "to_out", "out_proj", "proj_out", "wo", "output"), "attn.out"),
    "gate": "attn.gate",
}  # fmt: skip
MLP = {
    **dict.fromkeys(("fc1", "conv1", "pw1", "w1", "fc1_x", "w2", "up_proj", "expand_conv"), "mlp.in"),
    **dict.fromkeys(("fc1_g", "w_gate", "gate_proj"), "mlp.gate"),
    **dict.fromkeys(("fc2", "conv2", "pw2", "w3", "down_proj"), "mlp.out"),
}  # fmt: skip
IS_ATTENTION = re.compile(r"att(?:entio)?n|^xca$|^gpsa$|^mhca$|^mhsa$", re.IGNORECASE)
IS_MLP = re.compile(r"mlp|ffn|feed_?forward|^glu", re.IGNORECASE)
IS_GATE = re.compile(
    r"squeeze|^se$|^se_|semodule|^eca|cbam|effectivese|globalcontext|gatherexcite|splitattn|selectivekernel", re.IGNORECASE
)
IS_SAMPLING = re.compile(r"down|transition|shortcut|reduc|merg|upsampl|^pool")
TOKENS = (("cls_token", "embed.class"), ("dist_token", "embed.distil"), ("reg_token", "embed.register"), ("latent", "embed.pool"))
POSITION = re.compile(r"pos|rel_|_rel$|attention_biases")
SCALE = re.compile(r"gamma|^ls\d*$|scale|gain|temperature|alpha|lambda")


CANCELLED_PARAMETERS = {("HSMSSD", "A")}
"""Class and name of parameters that a softmax cancels."""


def weight_role(path: str, around: Sequence[nn.Module], depth: int | None) -> str:
    """Role of the layer at `path`.

    Args:
        around: the layer and the modules that contain it, outermost first, without the root.
        depth: index of its block, or None outside of blocks.
    """
    layer: Any = around[-1]
    names = path.split(".")
    if depth is None and not any(IS_ATTENTION.search(name) for name in names):
        return _role_outside_blocks(layer)
    if any(POSITION.search(name) for name in names):
        return "embed.position"
    context = [f"{name}\0{type(module).__name__}" for name, module in zip(names, around, strict=True)][:-1]
    for level in range(len(context) - 1, -1, -1):
        name, kind = context[level].split("\0")
        inside = list(reversed(names[level + 1 :]))
        if IS_GATE.search(kind) or IS_GATE.search(name):
            return "se.in" if _widths(layer)[0] < _widths(layer)[1] else "se.out"
        if IS_MLP.search(kind) or IS_MLP.search(name):
            return next((MLP[n] for n in inside if n in MLP), "") or _mlp_role(layer)
        if IS_ATTENTION.search(kind) or IS_ATTENTION.search(name):
            return next((ATTENTION[n] for n in inside if n in ATTENTION), "") or layer_role(layer)
    if any(IS_SAMPLING.search(name) for name in names):
        return "embed.merge" if isinstance(layer, nn.Linear) else "conv.sample"
    return layer_role(layer)


def is_bias_cancelled(path: str, role: str, around: Sequence[nn.Module], model: nn.Module) -> bool:
    """True if what follows the layer cancels a constant that its bias adds, so that no output depends on it.

    A softmax cancels a constant added to all keys, unless keys are normalized first, or to all scores of a head. A layer norm
    over channels cancels one that is added to all channels of a token, as the last layer of a token-mixing MLP does.
    """
    if role == "attn.k":
        return not any(hasattr(module, name) for module in around for name in ("k_norm", "norm_k", "rope"))
    if re.search(r"(^|\.)mlp_tokens\.fc2$", path):
        return isinstance(model.get_submodule(path.rpartition(".mlp_tokens")[0] + ".norm1"), nn.LayerNorm)
    return re.search(r"(^|\.)(attn\.(proj_l|pos_proj)|rel_pos\.mlp\.fc2)$", path) is not None


def is_norm_bias_cancelled(path: str, model: nn.Module) -> bool:
    """True for a norm of keys before a softmax, without rotations, and for one before a pooling minus its input."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if name in ("k_norm", "norm_k"):
        return not any(hasattr(module, "rope") for module in (model, owner))
    return name == "norm1" and type(getattr(owner, "token_mixer", None)).__name__ == "Pooling"


def parameter_role(name: str) -> str:
    """Role of a parameter that belongs to no layer or norm."""
    for prefix, role in TOKENS:
        if name.startswith(prefix):
            return role
    if POSITION.search(name):
        return "embed.position"
    return "scale" if SCALE.search(name) else "other"


def _role_outside_blocks(layer: Any) -> str:
    if isinstance(layer, nn.Embedding):
        return "embed.position"
    if not isinstance(layer, nn.Conv2d):
        return "embed.patch"
    patches = layer.kernel_size == layer.stride and math.prod(layer.kernel_size) > 4
    return "conv.patch" if patches else "conv.stem"


def _mlp_role(layer: Any) -> str:
    if getattr(layer, "groups", 1) > 1:
        return layer_role(layer)
    outputs, inputs = _widths(layer)
    return "mlp.in" if outputs >= inputs else "mlp.out"


def _widths(layer: Any) -> tuple[int, int]:
    """Number of outputs and of inputs."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return (layer.embedding_dim, 0) if isinstance(layer, nn.Embedding) else (layer.out_channels, layer.in_channels)

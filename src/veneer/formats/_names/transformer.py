"""Original module names of diffusion transformers: fused projections, and the image stream before the text stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

Names = dict[str, tuple[tuple[str, ...], bool]]  # path -> diffusers' paths of its rows, and whether its halves are swapped
Paths = Mapping[str, tuple[str, ...]]

QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE: Paths = {
    "img_attn.qkv": QKV, "img_attn.proj": ("attn.to_out.0",), "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",), "txt_attn.qkv": ADDED, "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",), "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
SINGLE: Paths = {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)}
EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
CONTEXT = "context_block.adaLN_modulation.1"
JOINT: Paths = {
    "x_block.attn.qkv": QKV, "x_block.attn.proj": ("attn.to_out.0",), "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",), "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.qkv": ADDED, "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",), "context_block.mlp.fc2": ("ff_context.net.2",),
    CONTEXT: ("norm1_context.linear",),
}  # fmt: skip
BLOCK: Paths = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",), "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",),
}  # fmt: skip
LAST = "final_layer.adaLN_modulation.1"


def flux(model: nn.Module) -> Names:
    """FLUX.1. Source: black-forest-labs/flux `model.py`, `modules/layers.py`; diffusers `loaders/single_file_utils.py`."""
    found = {**_blocks(model, "transformer_blocks", "double_blocks", DOUBLE)}
    found |= _blocks(model, "single_transformer_blocks", "single_blocks", SINGLE)
    for name, embedder in EMBEDDERS.items():
        found |= _two_layers(f"time_text_embed.{embedder}", f"{name}.in_layer", f"{name}.out_layer")
    return found | _direct({"img_in": "x_embedder", "txt_in": "context_embedder"}) | _last_layers()


def sd3(model: nn.Module) -> Names:
    """Stable Diffusion 3. The last block's text stream ends in a norm with swapped halves, as in the model.

    Source: Stability-AI/sd3.5 `mmditx.py`; diffusers `loaders/single_file_utils.py`.
    """
    found = _blocks(model, "transformer_blocks", "joint_blocks", JOINT)
    for path in list(found)[-len(JOINT) :]:
        found[path] = (found[path][0], path.endswith(CONTEXT))
    for name, embedder in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        found |= _two_layers(f"time_text_embed.{embedder}", f"{name}.mlp.0", f"{name}.mlp.2")
    return found | _direct({"x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder"}) | _last_layers()


def pixart(model: nn.Module) -> Names:
    """PixArt-α and -Σ. Source: PixArt-alpha/PixArt-alpha `diffusion/model/nets`, `tools/convert_pixart_alpha_to_diffusers.py`."""
    found = _blocks(model, "transformer_blocks", "blocks", BLOCK)
    emb = "adaln_single.emb"
    for name, own in (("t_embedder", "timestep"), ("csize_embedder", "resolution"), ("ar_embedder", "aspect_ratio")):
        found |= _two_layers(f"{emb}.{own}_embedder", f"{name}.mlp.0", f"{name}.mlp.2")
    found |= _two_layers("caption_projection", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2")
    return found | _direct(
        {"x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear", "final_layer.linear": "proj_out"}
    )


def _blocks(model: nn.Module, own: str, first: str, inside: Paths) -> Names:
    return {
        f"{first}.{i}.{name}": (tuple(f"{own}.{i}.{path}" for path in paths), False)
        for i in range(_length(model, own))
        for name, paths in inside.items()
    }


def _length(model: nn.Module, name: str) -> int:
    blocks: Iterable[nn.Module] = getattr(model, name)
    return sum(1 for _ in blocks)


def _two_layers(own: str, *names: str) -> Names:
    return {name: ((f"{own}.linear_{i}",), False) for i, name in enumerate(names, 1)}


def _direct(names: Mapping[str, str]) -> Names:
    return {name: ((own,), False) for name, own in names.items()}


def _last_layers() -> Names:
    return {"final_layer.linear": (("proj_out",), False), LAST: (("norm_out.linear",), True)}

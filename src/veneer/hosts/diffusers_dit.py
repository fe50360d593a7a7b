"""Diffusion transformers of diffusers: DiT, PixArt, Stable Diffusion 3, FLUX, Sana."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from veneer.injection.host import Host, module_names
from veneer.injection.sites import Port, Site

from ._describe import SampleInputs, TowerPart
from ._diffusers import adaptive_norm, attention, basic_block, feed_forward, processor_order, remaining

FAMILIES = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "SanaTransformer2DModel",
)
BLOCKS = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
BEFORE = (
    "pos_embed", "patch_embed", "x_embedder", "adaln_single", "time_embed", "time_text_embed", "context_embedder",
    "caption_projection", "caption_norm",
)  # fmt: skip
AFTER = ("norm_out", "proj_out", "proj_out_1", "proj_out_2")
ROLES = {
    "pos_embed": "embed.patch", "patch_embed": "embed.patch", "x_embedder": "embed.patch", "context_embedder": "embed.context",
    "caption_projection": "embed.context", "linear": "adaln", "proj_out": "proj.out", "proj_out_1": "adaln",
    "proj_out_2": "proj.out",
}  # fmt: skip


class DiffusersDiT(Host):
    """DiT, PixArt, SD3, FLUX and Sana transformers: every site, found by walking the model's blocks.

    Depth counts double-stream blocks and then single-stream blocks; if a model has both, `stage` is `double` or `single`.
    Branches are written at the output of their module, before the gate of adaptive norms.
    Joint blocks return text before image tokens, so they have no `StreamSite`.
    """

    name: ClassVar[str] = "diffusers_dit"
    tower: ClassVar[str] = "dit"
    library: ClassVar[str] = "diffusers"

    def matches(self, model: nn.Module) -> bool:
        return any(n.startswith("diffusers.") and n.rpartition(".")[2] in FAMILIES for n in module_names(model))

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        part, order = TowerPart(model, self.tower, component), processor_order(model)
        for name in BEFORE:
            yield from remaining(part, name, ROLES)
        for depth, (path, stage) in enumerate(blocks(model)):
            yield from _block(part.at(depth=depth, stage=stage), path, order)
        if part.has("", "scale_shift_table"):
            yield part.parameter("", "scale_shift_table", "adaln.table")
        for name in AFTER:
            yield from remaining(part, name, ROLES)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        bare: Any = model
        draw, config = SampleInputs(model), bare.config
        if "num_single_layers" in config:
            return _flux_sample(draw, config)
        side = 4 * config["patch_size"]
        inputs: dict[str, Any] = {
            "hidden_states": draw.normal(2, config["in_channels"], side, side),
            "timestep": draw.tensor([37, 801]),
        }
        if "caption_channels" in config:
            width = config["cross_attention_dim"] if config["caption_channels"] is None else config["caption_channels"]
            inputs["encoder_hidden_states"] = draw.normal(2, 5, width)
        elif "pooled_projection_dim" in config:
            inputs["encoder_hidden_states"] = draw.normal(2, 5, config["joint_attention_dim"])
            inputs["pooled_projections"] = draw.normal(2, config["pooled_projection_dim"])
        else:
            inputs["class_labels"] = draw.tensor([1, 3])
        if getattr(model, "use_additional_conditions", False):
            sizes = {"resolution": draw.normal(2, 2), "aspect_ratio": draw.normal(2, 1)}
            inputs["added_cond_kwargs"] = sizes
        if config.get("guidance_embeds", False):
            inputs["guidance"] = draw.normal(2).abs()
        return inputs

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
        grid = {**heads, "sample_size": 8, "patch_size": 2, "in_channels": 4}
        text = {"caption_channels": 12, "cross_attention_dim": 16}
        joint = {"joint_attention_dim": 24, "pooled_projection_dim": 20}
        sana = {"num_cross_attention_heads": 4, "cross_attention_head_dim": 4, "patch_size": 1, "out_channels": 4}
        rope = {"axes_dims_rope": (2, 2, 4), "num_single_layers": 2, "in_channels": 12, "guidance_embeds": True}
        return {
            "dit": lambda: _build("DiTTransformer2DModel", **grid, num_embeds_ada_norm=10),
            "pixart": lambda: _build("PixArtTransformer2DModel", **grid, **text, out_channels=8),
            "sd3": lambda: _build("SD3Transformer2DModel", **grid, **joint, caption_projection_dim=16, pos_embed_max_size=8),
            "flux": lambda: _build("FluxTransformer2DModel", **heads, **joint, **rope),
            "sana": lambda: _build("SanaTransformer2DModel", **{**grid, **text, **sana}),
        }


def _build(cls: str, **options: Any) -> nn.Module:
    import diffusers

    model: nn.Module = getattr(diffusers, cls)(**options)
    return model.eval()


def _flux_sample(draw: SampleInputs, config: Any) -> dict[str, Any]:
    inputs = {
        "hidden_states": draw.normal(2, 16, config["in_channels"]),
        "encoder_hidden_states": draw.normal(2, 5, config["joint_attention_dim"]),
        "pooled_projections": draw.normal(2, config["pooled_projection_dim"]),
        "timestep": draw.tensor([0.25, 0.75], draw.dtype),
        "img_ids": draw.tensor([[0.0, i // 4, i % 4] for i in range(16)], draw.dtype),
        "txt_ids": draw.tensor([[0.0, 0.0, 0.0]] * 5, draw.dtype),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = draw.tensor([1.0, 3.5], draw.dtype)
    return inputs


def blocks(model: nn.Module) -> list[tuple[str, str | None]]:
    """Path and stage of every block, in the order of the forward pass."""
    counts = {name: len(getattr(model, name, ())) for name in BLOCKS}
    several = all(counts.values())
    return [(f"{name}.{i}", BLOCKS[name] if several else None) for name in BLOCKS for i in range(counts[name])]


def _block(part: TowerPart, path: str, order: dict[str, int]) -> Iterator[Site]:
    block = part.module(path)
    if hasattr(block, "proj_mlp"):
        return _single(part, path, order)
    return _joint(part, path, order) if hasattr(block, "norm1_context") else basic_block(part, path, order)


def _single(part: TowerPart, path: str, order: dict[str, int]) -> Iterator[Site]:
    """FLUX's single-stream block: parallel attention and feed-forward with one output layer."""
    yield from adaptive_norm(part, f"{path}.norm")
    yield from part.layer(f"{path}.proj_mlp", "single.in")
    yield from attention(part, f"{path}.attn", order[f"{path}.attn"])
    yield from part.layer(f"{path}.proj_out", "single.out")
    width = part.module(f"{path}.attn").query_dim
    yield part.branch(path, "single", Port(f"{path}.norm", "in"), Port(f"{path}.proj_out", "out"), width)


def _joint(part: TowerPart, path: str, order: dict[str, int]) -> Iterator[Site]:
    """A double-stream block of SD3 or FLUX: text and image tokens have separate weights and a joint attention."""
    block = part.module(path)
    width = block.attn.query_dim
    yield from adaptive_norm(part, f"{path}.norm1")
    yield from adaptive_norm(part, f"{path}.norm1_context")
    yield from attention(part, f"{path}.attn", order[f"{path}.attn"])
    yield part.branch(f"{path}.attn", "attn", Port(f"{path}.norm1", "in"), Port(f"{path}.attn", "out"), width)
    if getattr(block.attn, "to_add_out", None) is not None:
        out = f"{path}.attn.to_add_out"
        yield part.branch(f"{path}.attn.context", "attn.context", Port(f"{path}.norm1_context", "in"), Port(out, "out"), width)
    if getattr(block, "attn2", None) is not None:
        yield from attention(part, f"{path}.attn2", order[f"{path}.attn2"])
        yield part.branch(f"{path}.attn2", "attn", Port(f"{path}.norm1", "in"), Port(f"{path}.attn2", "out"), width)
    for suffix, role in (("", "mlp"), ("_context", "mlp.context")):
        if getattr(block, f"ff{suffix}", None) is not None:
            ff, norm = f"{path}.ff{suffix}", f"{path}.norm2{suffix}"
            yield from adaptive_norm(part, norm)
            yield from feed_forward(part, ff, role)
            yield part.branch(ff, role, Port(norm, "in"), Port(ff, "out"), width)

"""Building blocks of diffusers' UNets and transformers: attention, feed-forward, adaptive norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from veneer.injection.sites import AttentionSite, Port, Site

from ._describe import LAYERS, TowerPart, is_norm, own_parameters

EMBEDDERS = ("timestep_embedder", "text_embedder", "guidance_embedder", "resolution_embedder", "aspect_ratio_embedder")


def is_attention(module: object) -> bool:
    """True for diffusers' attention modules, which have a processor."""
    return hasattr(type(module), "get_processor") and hasattr(module, "to_q")


def processor_order(model: nn.Module) -> dict[str, int]:
    """Path -> index of each attention module, in registration order, as in `attn_processors` (UNet: down, up, mid)."""
    return {path: i for i, path in enumerate(path for path, module in model.named_modules() if is_attention(module))}


def is_fused(attn: Any) -> bool:
    """True if the fused projections are called.

    `Attention` keeps its flag when a model is unfused, so its processor decides; other attention modules reset the flag.
    """
    if not getattr(attn, "fused_projections", False) or hasattr(attn, "unfuse_projections"):
        return bool(getattr(attn, "fused_projections", False))
    processor = type(attn.processor)
    return not processor.__module__.startswith("diffusers.") or "Fused" in processor.__name__


def attention(part: TowerPart, path: str, index: int) -> Iterator[Site]:
    """All sites of one attention module, roles `attn.*` or, if its context is another sequence, `xattn.*`."""
    attn = part.module(path)
    role = "xattn" if getattr(attn, "is_cross_attention", False) else "attn"
    guarded = part.at(guard=f"{path}.fused_projections")
    added = getattr(attn, "added_kv_proj_dim", None)
    for norm in ("group_norm", "norm_cross"):
        yield from part.norm(f"{path}.{norm}")
    plain, normed = _plain_softmax(attn), getattr(attn, "norm_k", None) is not None
    yield from _projections(guarded, path, role, inert_key=plain and not normed)
    for norm in ("norm_q", "norm_k"):
        yield from part.norm(f"{path}.{norm}", "norm.qk", inert_bias=plain and norm == "norm_k")
    if added is not None:
        yield from _context_projections(guarded, path, f"{role}.context")
    yield from part.layer(f"{path}.to_out.0", f"{role}.out")
    yield from part.layer(f"{path}.to_add_out", f"{role}.context.out")
    context = added or getattr(attn, "cross_attention_dim", None) or attn.query_dim
    yield AttentionSite(
        name=f"{path}.processor", role=f"{role}.processor", path=path, width=attn.query_dim, context_width=context,
        heads=attn.heads, cross=role == "xattn", index=index, **part.labels,
    )  # fmt: skip


def _plain_softmax(attn: Any) -> bool:
    """True if a constant added to all keys shifts all scores of a query alike: one softmax over these keys only, no rotation."""
    linear = "Linear" in type(attn.processor).__name__
    return hasattr(attn, "is_cross_attention") and getattr(attn, "added_kv_proj_dim", None) is None and not linear


def _projections(part: TowerPart, path: str, role: str, inert_key: bool) -> Iterator[Site]:
    attn = part.module(path)
    names = {f"{path}.to_{x}": (f"{role}.{x}", getattr(attn, f"to_{x}")) for x in "qkv"}
    rows = {name: (r, linear.out_features) for name, (r, linear) in names.items() if linear is not None}
    inert = (f"{role}.k",) if inert_key else ()
    if is_fused(attn) and role == "xattn":
        yield from part.layer(f"{path}.to_q", f"{role}.q")
        del rows[f"{path}.to_q"]
        yield from part.slices(f"{path}.to_kv", f"{role}.kv", rows, inert_bias=inert)
    elif is_fused(attn):
        yield from part.slices(f"{path}.to_qkv", f"{role}.qkv", rows, inert_bias=inert)
    else:
        for name, (r, _) in rows.items():
            yield from part.layer(name, r, inert_bias=r in inert)


def _context_projections(part: TowerPart, path: str, role: str) -> Iterator[Site]:
    """Projections of the second stream. Its queries have no effect if its output is unused (last block of SD3)."""
    attn = part.module(path)
    dropped = getattr(attn, "to_add_out", None) is None
    if is_fused(attn) and getattr(attn, "to_added_qkv", None) is not None:
        rows = {f"{path}.add_{x}_proj": (f"{role}.{x}", getattr(attn, f"add_{x}_proj").out_features) for x in "qkv"}
        yield from part.slices(f"{path}.to_added_qkv", f"{role}.qkv", rows, inert=(f"{role}.q",) if dropped else ())
    else:
        for x in "qkv":
            yield from part.layer(f"{path}.add_{x}_proj", f"{role}.{x}", inert=dropped and x == "q")
    plain = part.at(guard=None)
    yield from plain.norm(f"{path}.norm_added_q", "norm.qk", inert=dropped)
    yield from plain.norm(f"{path}.norm_added_k", "norm.qk")


def feed_forward(part: TowerPart, path: str, role: str = "mlp") -> Iterator[Site]:
    """The two layers of a feed-forward: `ff.net.0.proj` and `ff.net.2`, or Sana's three convolutions."""
    if part.module(f"{path}.conv_inverted") is not None:
        yield from part.layer(f"{path}.conv_inverted", f"{role}.in")
        yield from part.layer(f"{path}.conv_depth", f"{role}.conv")
        yield from part.layer(f"{path}.conv_point", f"{role}.out")
    else:
        yield from part.layer(f"{path}.net.0.proj", f"{role}.in")
        yield from part.layer(f"{path}.net.2", f"{role}.out")


def adaptive_norm(part: TowerPart, path: str) -> Iterator[Site]:
    """A norm, or an adaptive norm: its embedders (`time.embed`, `class.embed`), linear layer (`adaln`) and affine part."""
    for leaf, module in part.modules_with_parameters(path):
        if is_norm(module):
            yield from part.norm(leaf)
        else:
            yield from part.layer(leaf, embedder_role(leaf) or "adaln")


def embedder_role(path: str) -> str | None:
    """`time.embed` or `class.embed` for a layer inside a condition embedder, else None."""
    names = path.split(".")
    if any(name in names for name in EMBEDDERS):
        return "time.embed"
    return "class.embed" if "class_embedder" in names else None


def basic_block(part: TowerPart, path: str, order: dict[str, int]) -> Iterator[Site]:
    """A `BasicTransformerBlock`, or Sana's: self-attention, optional cross-attention, feed-forward."""
    block = part.module(path)
    # PixArt and Sana apply their second norm to the feed-forward, and none to the cross-attention.
    single = getattr(block, "scale_shift_table", None) is not None
    norms = {"attn1": "norm1", "attn2": "" if single else "norm2", "ff": "norm2" if single else "norm3"}
    if single:
        yield part.parameter(path, "scale_shift_table", "adaln.table")
    for name, norm in norms.items():
        child = getattr(block, name, None)
        if child is None:
            continue
        if norm:
            yield from adaptive_norm(part, f"{path}.{norm}")
        if name == "ff":
            yield from feed_forward(part, f"{path}.ff")
        else:
            yield from attention(part, f"{path}.{name}", order[f"{path}.{name}"])
        yield _branch(part, f"{path}.{name}", f"{path}.{norm}" if norm else "", block.attn1.query_dim)
    yield part.stream(path, block.attn1.query_dim)


def _branch(part: TowerPart, path: str, norm: str, width: int) -> Site:
    """The branch of a module: reads its norm's input, or its own if it has no norm or another layout (Sana's convolutions)."""
    module = part.module(path)
    role = "mlp" if path.endswith(".ff") else "xattn" if module.is_cross_attention else "attn"
    convolves = hasattr(module, "conv_inverted")
    read = Port(path if convolves or part.module(norm) is None or not norm else norm, "in")
    return part.branch(path, role, read, Port(path, "out"), width, layout="NCHW" if convolves else "NLC")


def remaining(part: TowerPart, path: str, roles: dict[str, str]) -> Iterator[Site]:
    """Everything below `path`: norms, and layers with the role of the last path component in `roles`, else `other`."""
    for leaf, module in part.modules_with_parameters(path):
        if is_norm(module):
            yield from part.norm(leaf)
        elif isinstance(module, LAYERS):
            matches: list[str] = [roles[n] for n in reversed(leaf.split(".")) if n in roles]
            yield from part.layer(
                leaf, embedder_role(leaf) or (matches[0] if matches else "other"), inert_bias=leaf.endswith(".pool.k_proj")
            )
        elif isinstance(module, nn.Module):
            for param in own_parameters(module):
                yield part.parameter(leaf, param, "other")

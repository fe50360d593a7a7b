"""Building blocks of diffusers' UNets and transformers: attention, feed-forward, adaptive norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from veneer.injection.attention_sites import AttentionSite
from veneer.injection.sites import Port, Site

from ._describe import LAYERS, TowerPart, is_norm, own_parameters

EMBEDDERS = ("timestep_embedder", "text_embedder", "guidance_embedder", "resolution_embedder", "aspect_ratio_embedder")


@dataclass(frozen=True)
class AttentionNames:
    """Names of the modules of an attention module, and what its class does not tell.

    Args:
        projections: of queries, keys and values. `out`: output layer, or the list that holds it.
        added: projections of a second stream, or of keys and values of another context. `added_out`: its output layer.
        norms, added_norms: of queries and keys. `gate`: layer of a gate on the output.
        cross: True for cross-attention; None to ask the module.
        rotary: True if keys are rotated, so that their bias has an effect under a plain softmax.
    """

    projections: tuple[str, str, str] = ("to_q", "to_k", "to_v")
    out: tuple[str, ...] = ("to_out.0", "to_out")
    added: tuple[str, str, str] = ("add_q_proj", "add_k_proj", "add_v_proj")
    added_out: str = "to_add_out"
    norms: tuple[str, str] = ("norm_q", "norm_k")
    added_norms: tuple[str, str] = ("norm_added_q", "norm_added_k")
    gate: str = "to_gate"
    cross: bool | None = None
    rotary: bool = False

    def is_cross(self, attn: Any) -> bool:
        """True if the context of the module is another sequence."""
        return bool(getattr(attn, "is_cross_attention", False)) if self.cross is None else self.cross


NAMES = AttentionNames()


def is_attention(module: object) -> bool:
    """True for diffusers' attention modules, which have a processor."""
    return hasattr(type(module), "get_processor") or (hasattr(module, "processor") and hasattr(module, "to_q"))


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


def attention(part: TowerPart, path: str, index: int, names: AttentionNames = NAMES) -> Iterator[Site]:
    """All sites of one attention module, roles `attn.*` or, if its context is another sequence, `xattn.*`."""
    attn = part.module(path)
    role = "xattn" if names.is_cross(attn) else "attn"
    guarded = part.at(guard=f"{path}.fused_projections" if hasattr(attn, "fused_projections") else None)
    for norm in ("group_norm", "norm_cross"):
        yield from part.norm(f"{path}.{norm}")
    plain, normed = _plain_softmax(attn, names), getattr(attn, names.norms[1], None) is not None
    yield from _projections(guarded, path, role, names, inert_key=plain and not normed)
    for norm in names.norms:
        yield from part.norm(f"{path}.{norm}", "norm.qk", inert_bias=plain and norm == names.norms[1])
    if _has_context(part, path, names):
        yield from _context_projections(guarded, path, f"{role}.context", names)
    yield from part.layer(f"{path}.{names.gate}", f"{role}.gate")
    for out in names.out:
        yield from part.layer(f"{path}.{out}", f"{role}.out")
    yield from part.layer(f"{path}.{names.added_out}", f"{role}.context.out")
    yield AttentionSite(
        name=f"{path}.processor", role=f"{role}.processor", path=path, **attention_shape(attn, names),
        cross=role == "xattn", index=index, plain=_attends_to_more(attn, names),
        sdpa=role == "attn" and _attends_to_itself(attn), **part.labels,
    )  # fmt: skip


def attention_shape(attn: Any, names: AttentionNames = NAMES) -> dict[str, Any]:
    """Width, width of the context, and heads of an attention module, as keyword arguments of an `AttentionSite`."""
    key = getattr(attn, names.projections[1], None)
    width = getattr(attn, "query_dim", None) or getattr(attn, names.projections[0]).in_features
    added = getattr(attn, "added_kv_proj_dim", None) or getattr(getattr(attn, names.added[1], None), "in_features", None)
    context = added or getattr(attn, "cross_attention_dim", None) or getattr(key, "in_features", None) or width
    return {"width": width, "context_width": context, "heads": getattr(attn, "heads", None) or attn.num_heads}


def _attends_to_more(attn: Any, names: AttentionNames) -> bool:
    """True if the queries are not rotated or normalized by head, and the output is that of diffusers' `Attention`."""
    norm, query = getattr(attn, names.norms[0], None), getattr(attn, names.projections[0])
    whole = norm is None or getattr(getattr(norm, "weight", None), "shape", None) == (query.out_features,)
    return whole and not names.rotary and hasattr(attn, "rescale_output_factor")


def _attends_to_itself(attn: Any) -> bool:
    """True if the processor, without those of adapters, calls attention with the module's tokens as queries and keys."""
    processor = attn.processor
    while "_inner" in getattr(processor, "__dict__", {}):
        processor = processor.__dict__["_inner"]
    return type(processor).__name__ in ("AttnProcessor2_0", "FusedAttnProcessor2_0")


def _has_context(part: TowerPart, path: str, names: AttentionNames) -> bool:
    return any(part.module(f"{path}.{name}") is not None for name in names.added)


def _plain_softmax(attn: Any, names: AttentionNames) -> bool:
    """True if a constant added to all keys shifts all scores of a query alike: one softmax over these keys only, no rotation."""
    linear = "Linear" in type(attn.processor).__name__
    return hasattr(attn, "is_cross_attention") and getattr(attn, names.added[1], None) is None and not linear and not names.rotary


def _projections(part: TowerPart, path: str, role: str, names: AttentionNames, inert_key: bool) -> Iterator[Site]:
    attn = part.module(path)
    layers = {f"{path}.{name}": (f"{role}.{x}", getattr(attn, name)) for x, name in zip("qkv", names.projections, strict=True)}
    rows = {name: (r, linear.out_features) for name, (r, linear) in layers.items() if linear is not None}
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


def _context_projections(part: TowerPart, path: str, role: str, names: AttentionNames) -> Iterator[Site]:
    """Projections of the second stream. Its queries have no effect if its output is unused (last block of SD3)."""
    attn = part.module(path)
    dropped = getattr(attn, names.added_out, None) is None
    if is_fused(attn) and getattr(attn, "to_added_qkv", None) is not None:
        rows = {f"{path}.add_{x}_proj": (f"{role}.{x}", getattr(attn, f"add_{x}_proj").out_features) for x in "qkv"}
        yield from part.slices(f"{path}.to_added_qkv", f"{role}.qkv", rows, inert=(f"{role}.q",) if dropped else ())
    else:
        for x, name in zip("qkv", names.added, strict=True):
            yield from part.layer(f"{path}.{name}", f"{role}.{x}", inert=dropped and x == "q")
    plain = part.at(guard=None)
    yield from plain.norm(f"{path}.{names.added_norms[0]}", "norm.qk", inert=dropped)
    yield from plain.norm(f"{path}.{names.added_norms[1]}", "norm.qk")


def feed_forward(part: TowerPart, path: str, role: str = "mlp") -> Iterator[Site]:
    """The two layers of a feed-forward: `ff.net.0.proj` and `ff.net.2`."""
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
    """A `BasicTransformerBlock`: self-attention, optional cross-attention, feed-forward, each after its norm."""
    block = part.module(path)
    width = block.attn1.query_dim
    for name, norm in {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}.items():
        child, inner = getattr(block, name, None), f"{path}.{name}"
        if child is None:
            continue
        yield from adaptive_norm(part, f"{path}.{norm}")
        if name == "ff":
            yield from feed_forward(part, inner)
        else:
            yield from attention(part, inner, order[inner])
        role = "mlp" if name == "ff" else "xattn" if child.is_cross_attention else "attn"
        read = Port(inner if part.module(f"{path}.{norm}") is None else f"{path}.{norm}", "in")
        yield part.branch(inner, role, read, Port(inner, "out"), width)
    yield part.stream(path, width)


def remaining(
    part: TowerPart,
    path: str,
    roles: Mapping[str, str],
    first: Mapping[str, str] = MappingProxyType({}),
    inert_biases: tuple[str, ...] = (".pool.k_proj",),
    read: tuple[str, ...] = (),
    inert: tuple[str, ...] = (),
) -> Iterator[Site]:
    """Everything below `path`: norms, and layers with the role of the last path component in `roles`, else `other`.

    Args:
        first: roles that also hold inside condition embedders. `inert_biases`: ends of paths of layers whose bias has no effect.
        read: ends of paths of layers whose tensors are read by another module, which does not call them.
        inert: ends of paths of parameters without effect.
    """
    for leaf, module in part.modules_with_parameters(path):
        if is_norm(module):
            yield from part.norm(leaf)
        elif isinstance(module, LAYERS):
            role = _role(leaf, first) or embedder_role(leaf) or _role(leaf, roles) or "other"
            yield from part.layer(leaf, role, called=not leaf.endswith(read), inert_bias=leaf.endswith(inert_biases))
        elif isinstance(module, nn.Module):
            for param in own_parameters(module):
                role = first.get(param, roles.get(param, "other"))
                yield part.parameter(leaf, param, role, inert=f"{leaf}.{param}".endswith(inert))


def _role(path: str, roles: Mapping[str, str]) -> str | None:
    """The role of the last path component in `roles`."""
    return next((roles[name] for name in reversed(path.split(".")) if name in roles), None)

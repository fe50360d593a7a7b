"""open_clip's transformer blocks: packed attention that reads its weights, MLPs, attention pooling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from veneer.injection.sites import ParamSite, Port, Site, TokenSite, WeightSite

from ._describe import TowerPart


def blocks(part: TowerPart, path: str, *, prefix_only: bool = False, **tokens: Any) -> Iterator[Site]:
    """The residual blocks of the transformer at `path`.

    Args:
        prefix_only: True if nothing reads what the last block makes of the tokens after the prefix.
        tokens: fields that describe the tokens: `prefix_tokens`, `grid`, `patch` and `can_insert`.
    """
    transformer = part.module(path)
    count, width = len(transformer.resblocks), transformer.width
    yield _tokens(part, path, width, 0, count - 1, "tokens.tower", tokens)
    for depth in range(count):
        here = part.at(depth=depth)
        can_insert = tokens.get("can_insert", True)
        can_drop = can_insert and not (prefix_only and depth == count - 1)
        flags = {"can_drop": can_drop, "can_extend": can_insert}
        yield from block(here, f"{path}.resblocks.{depth}", width, **flags, **_grid_fields(tokens))
        yield _tokens(here, path, width, depth, depth, "tokens.block", tokens)


def _grid_fields(tokens: dict[str, Any]) -> dict[str, Any]:
    return {key: tokens[key] for key in ("prefix_tokens", "grid") if key in tokens}


def _tokens(part: TowerPart, path: str, width: int, first: int, last: int, role: str, tokens: dict[str, Any]) -> TokenSite:
    name = f"{path}.tokens" if role == "tokens.tower" else f"{path}.resblocks.{first}.tokens"
    enter, leave = Port(f"{path}.resblocks.{first}", "in"), Port(f"{path}.resblocks.{last}", "out")
    facts = {key: value for key, value in tokens.items() if key != "grid"}
    return TokenSite(name=name, role=role, enter=enter, leave=leave, width=width, **facts, **part.labels)


def block(
    part: TowerPart, path: str, width: int, kind: str = "attn", *, can_drop: bool = False, can_extend: bool = False, **place: Any
) -> Iterator[Site]:
    """A block: attention (`kind` `xattn` if it reads image tokens) and an MLP, each after its norm.

    Args:
        can_drop: of its stream. `can_extend`: of its attention. `place`: `prefix_tokens` and `grid` of its stream and branches.
    """
    attn, mlp = f"{path}.attn", f"{path}.mlp"
    yield from part.norm(f"{path}.ln_1")
    yield from part.norm(f"{path}.ln_1_kv")
    layers = attention(part, attn, kind)
    whole = kind == "attn" and _is_standard(part.module(attn))
    yield from part.self_attention(attn, layers, can_extend=can_extend) if whole else layers
    yield from part.norm(f"{path}.ln_attn")
    yield from _branch_end(part, path, 1, attn, kind, width, place)
    yield from part.norm(f"{path}.ln_2")
    yield from part.layer(f"{mlp}.c_fc", "mlp.in")
    yield from part.norm(f"{mlp}.ln")
    yield from part.layer(f"{mlp}.c_proj", "mlp.out")
    yield from _branch_end(part, path, 2, mlp, "mlp", width, place)
    yield part.stream(path, width, can_drop=can_drop, **place)


def _branch_end(part: TowerPart, path: str, i: int, inner: str, kind: str, width: int, place: dict[str, Any]) -> Iterator[Site]:
    """The layer scale at the end of a branch, and the branch."""
    scale, norm = f"{path}.ls_{i}", f"{path}.ln_{i}"
    if part.has(scale, "gamma"):
        yield part.parameter(scale, "gamma", "scale")
    yield part.branch(inner, kind, Port(norm, "in"), Port(scale, "out"), width, normed=Port(norm, "out"), **place)


def _is_standard(attn: Any) -> bool:
    """True for torch's attention without further keys that is called with the batch first."""
    return isinstance(attn, nn.MultiheadAttention) and attn.batch_first and attn.bias_k is None


def attention(part: TowerPart, path: str, kind: str) -> Iterator[Site]:
    """Queries, keys and values, packed in one tensor or separate, and the output layer.

    torch's `MultiheadAttention` reads all of them and calls none; open_clip's own attention calls its output layer.
    """
    attn = part.module(path)
    own = not isinstance(attn, nn.MultiheadAttention)
    normed = own and not isinstance(attn.ln_k, nn.Identity)
    # A constant added to all keys shifts all scores of a query alike, which a plain softmax cancels.
    plain = not (own and attn.scaled_cosine)
    yield from _projections(part, path, kind, inert=plain and not normed)
    for name in ("ln_q", "ln_k"):
        yield from part.norm(f"{path}.{name}", "norm.qk", inert_bias=plain and name == "ln_k")
    for name in ("logit_scale", "head_scale"):
        if part.has(path, name):
            yield part.parameter(path, name, "scale")
    yield from part.norm(f"{path}.ln_inner")
    yield from part.layer(f"{path}.out_proj", f"{kind}.out", called=own)


def _projections(part: TowerPart, path: str, kind: str, inert: bool) -> Iterator[Site]:
    attn = part.module(path)
    packed, biased = part.has(path, "in_proj_weight"), part.has(path, "in_proj_bias")
    width = attn.out_proj.out_features
    inputs = {"q": width, "k": getattr(attn, "kdim", width), "v": getattr(attn, "vdim", width)}
    fields: dict[str, Any] = {"path": path, "called": False, "bias": f"{path}.in_proj_bias" if biased else "", **part.labels}
    if packed:
        whole: dict[str, Any] = {"param": "in_proj_weight", "fused": True, "d_out": 3 * width, "d_in": width}
        yield WeightSite(name=f"{path}.in_proj", role=f"{kind}.qkv", **whole, **fields)
    for i, (x, d_in) in enumerate(inputs.items()):
        rows = (i * width, (i + 1) * width)
        tensor = {"param": "in_proj_weight", "rows": rows} if packed else {"param": f"{x}_proj_weight"}
        size: dict[str, Any] = {"d_out": width, "d_in": d_in, "bias_rows": rows if biased else None}
        yield WeightSite(name=f"{path}.{x}", role=f"{kind}.{x}", **tensor, **size, **fields)
        if biased:
            yield ParamSite(
                name=f"{path}.{x}.bias", role=f"bias.{kind}.{x}", path=path, param="in_proj_bias", shape=(width,), rows=rows,
                inert=inert and x == "k", **part.labels,
            )  # fmt: skip


def pooler(part: TowerPart, path: str) -> Iterator[Site]:
    """Attention pooling with learned queries; empty if the tower has no pooling."""
    if part.module(path) is None:
        return
    yield part.parameter(path, "query", "embed.pool")
    yield from part.norm(f"{path}.ln_k")
    yield from part.norm(f"{path}.ln_q")
    yield from attention(part, f"{path}.attn", "pool")

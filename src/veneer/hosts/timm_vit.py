"""timm's plain vision transformers: ViT, DeiT, AugReg, CLIP and MAE towers, DINOv2, BEiT, EVA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from veneer.injection.host import Host, module_names
from veneer.injection.sites import PixelSite, Port, Site, TokenSite

from ._describe import LAYERS, SampleInputs, TowerPart, is_norm, own_parameters
from ._timm import pixels

FAMILIES = {"timm.models.vision_transformer.VisionTransformer", "timm.models.beit.Beit", "timm.models.eva.Eva"}
TOKENS = {
    "cls_token": "embed.class", "dist_token": "embed.distil", "reg_token": "embed.register", "pos_embed": "embed.position",
}  # fmt: skip
ATTENTION = ("Attention", "EvaAttention")  # softmax over all tokens; DiffAttention subtracts two maps
SCALES = {"attn": ("ls1.gamma", "gamma_1"), "mlp": ("ls2.gamma", "gamma_2")}


class TimmViT(Host):
    """VisionTransformer (with its distilled subclass), Beit and Eva: every site, found by walking the model's blocks.

    Fused weights (`attn.qkv`, packed gated MLPs, `in_proj` of parallel blocks) have sites for row slices, and for the whole
    weight if selected by name. BEiT and EVA read `attn.qkv.weight` if there is a query bias: `called=False`.
    Tokens cannot be inserted if positions are rotary or relative.
    """

    name: ClassVar[str] = "timm_vit"
    tower: ClassVar[str] = "vision"
    library: ClassVar[str] = "timm"

    def matches(self, model: nn.Module) -> bool:
        return not FAMILIES.isdisjoint(module_names(model))

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        vit: Any = model
        part = TowerPart(model, self.tower, component)
        yield _pixels(part)
        yield from _stem(part)
        yield from _tokens(part, "", 0, len(vit.blocks) - 1, "tokens.tower")
        for depth in range(len(vit.blocks)):
            yield from _block(part.at(depth=depth), f"blocks.{depth}")
            yield from _tokens(part.at(depth=depth), f"blocks.{depth}.", depth, depth, "tokens.block")
        yield from _head(part)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        height, width, channels = _pixels(TowerPart(model, self.tower)).size
        return {"x": SampleInputs(model).normal(2, channels, height, width)}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        registers = {"reg_tokens": 2, "no_embed_class": True, "init_values": 1e-1}
        eva = {"swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True}
        return {
            "vit": lambda: _build("vit_tiny_patch16_224"),
            "deit_distilled": lambda: _build("deit_tiny_distilled_patch16_224"),
            "vit_registers": lambda: _build("vit_small_patch14_dinov2", **registers, global_pool="token"),
            "beit": lambda: _build("beit_base_patch16_224", init_values=0.1),
            "eva": lambda: _build("eva02_tiny_patch14_224", **eva),
        }


def _build(architecture: str, **options: Any) -> nn.Module:
    import timm

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0, "num_classes": 10}
    model: nn.Module = timm.create_model(architecture, pretrained=False, **{**shape, **options})
    return model.eval()


def _pixels(part: TowerPart) -> PixelSite:
    vit: Any = part.model
    return pixels(part, getattr(vit.patch_embed, "img_size", None))


def _stem(part: TowerPart) -> Iterator[Site]:
    """Patch embedding, learned tokens and positions, and the norm before the blocks."""
    for path, module in part.modules_with_parameters("patch_embed"):
        if is_norm(module):
            yield from part.norm(path)
        elif isinstance(module, LAYERS):
            yield from part.layer(path, "conv.patch" if path == "patch_embed.proj" else "conv.stem")
    for param, role in TOKENS.items():
        if part.has("", param):
            yield part.parameter("", param, role)
    for name in ("rel_pos_bias", "rope"):
        for path, module in part.modules_with_parameters(name):
            for param in own_parameters(module):
                yield part.parameter(path, param, "embed.position")
    yield from part.norm("norm_pre")


def _tokens(part: TowerPart, prefix: str, first: int, last: int, role: str) -> Iterator[Site]:
    vit: Any = part.model
    patch = getattr(vit.patch_embed, "patch_size", (16, 16))
    yield TokenSite(
        name=f"{prefix}tokens", role=role, enter=Port(f"blocks.{first}", "in"), leave=Port(f"blocks.{last}", "out"),
        width=vit.embed_dim, prefix_tokens=vit.num_prefix_tokens, patch=(*patch, vit.in_chans), can_insert=not _fixes_length(vit),
        **part.labels,
    )  # fmt: skip


def _fixes_length(vit: Any) -> bool:
    """True if tables of relative positions or rotations fix the number of tokens."""
    relative = any(getattr(getattr(b, "attn", None), "relative_position_bias_table", None) is not None for b in vit.blocks)
    return relative or any(getattr(vit, name, None) is not None for name in ("rope", "rel_pos_bias"))


def _block(part: TowerPart, path: str) -> Iterator[Site]:
    vit: Any = part.model
    block, width = part.module(path), vit.embed_dim
    if hasattr(block, "in_proj"):
        yield from _fused_block(part, path, width)
    elif hasattr(block, "attns"):
        for name, kind in (("attns", "attn"), ("ffns", "mlp")):
            for i in range(len(getattr(block, name))):
                at = f"{path}.{name}.{i}"
                yield from _branch(part, at, kind, f"{at}.norm", f"{at}.drop_path", (f"{at}.ls.gamma",), width)
    else:
        for i, kind in enumerate(("attn", "mlp"), 1):
            scales = tuple(f"{path}.{scale}" for scale in SCALES[kind])
            yield from _branch(part, path, kind, f"{path}.norm{i}", f"{path}.drop_path{i}", scales, width)
    is_unread = vit.global_pool == "token" and part.depth == len(vit.blocks) - 1  # what the last block makes of the patches
    yield part.stream(path, width, can_drop=not _fixes_length(vit) and not is_unread, **_grid(part))


def _grid(part: TowerPart) -> dict[str, Any]:
    """Prefix tokens and patch grid, as fields of a site."""
    vit: Any = part.model
    size = getattr(vit.patch_embed, "grid_size", None)
    return {"prefix_tokens": vit.num_prefix_tokens, "grid": tuple(size) if size else None}


def _branch(part: TowerPart, at: str, kind: str, norm: str, end: str, scales: tuple[str, ...], width: int) -> Iterator[Site]:
    """Norm, attention or MLP, layer scale; the norm comes before or (residual post-norm blocks) after."""
    inner = f"{at}.{kind}"
    children = [name for name, _ in part.module(at).named_children()]
    norm_first = children.index(norm.rpartition(".")[2]) < children.index(kind)
    yield from part.norm(norm) if norm_first else ()
    yield from _attention(part, inner) if kind == "attn" else _mlp(part, inner)
    yield from () if norm_first else part.norm(norm)
    for scale in scales:
        owner, _, param = scale.rpartition(".")
        if part.has(owner, param):
            yield part.parameter(owner, param, "scale")
    read = Port(norm if norm_first else inner, "in")
    yield part.branch(inner, kind, read, Port(end, "out"), width, normed=Port(norm, "out") if norm_first else None, **_grid(part))


def _attention(part: TowerPart, path: str) -> Iterator[Site]:
    """Attention: its layers, and the whole of it if queries are not rotated and nothing follows the sum over the values."""
    attn, vit = part.module(path), part.model
    layers = _attention_layers(part, path)
    after = [getattr(attn, name, None) for name in ("gate", "norm", "sub_norm")]
    if getattr(vit, "rope", None) is not None or type(attn).__name__ not in ATTENTION or not all(map(_is_absent, after)):
        yield from layers
        return
    norms = {f"{name}_norm": f"{path}.{name[0]}_norm" for name in ("query", "key") if _norms(attn, name[0])}
    can_extend = not _fixes_length(vit) and not norms
    yield from part.self_attention(path, layers, **norms, can_extend=can_extend)


def _attention_layers(part: TowerPart, path: str) -> Iterator[Site]:
    attn, vit = part.module(path), part.model
    read = getattr(attn, "q_bias", None) is not None and not attn.qkv_bias_separate
    # Without a rotation of keys, a constant added to all keys shifts all scores of a query alike, which softmax cancels.
    plain = getattr(vit, "rope", None) is None
    inert = ("attn.k",) if plain and not _norms(attn, "k") else ()
    yield from part.layer(f"{path}.gate", "attn.gate")
    if getattr(attn, "qkv", None) is not None:
        rows = {f"{path}.{x}": (f"attn.{x}", attn.qkv.out_features // 3) for x in "qkv"}
        beside = {x: f"{path}.{x}_bias" for x in "qv"} if part.has(path, "q_bias") else {}
        yield from part.slices(f"{path}.qkv", "attn.qkv", rows, called=not read, inert_bias=inert, biases=beside)
    else:
        for x in "qkv":
            yield from part.layer(f"{path}.{x}_proj", f"attn.{x}", inert_bias=f"attn.{x}" in inert)
    for name, role in {
        "q_bias": "bias.attn.q",
        "v_bias": "bias.attn.v",
        "relative_position_bias_table": "embed.position",
    }.items():
        if part.has(path, name):
            yield part.parameter(path, name, role)
    yield from _qk_norms(part, path, plain)
    for name in own_parameters(attn):
        if name.startswith("lambda_"):
            yield part.parameter(path, name, "scale")
    for name in ("sub_norm", "norm"):
        yield from part.norm(f"{path}.{name}")
    yield from part.layer(f"{path}.proj", "attn.out")


def _norms(attn: Any, x: str) -> bool:
    """True if queries (`q`) or keys (`k`) are normalized."""
    return not _is_absent(getattr(attn, f"{x}_norm", None))


def _is_absent(module: Any) -> bool:
    return isinstance(module, (nn.Identity, type(None)))


def _qk_norms(part: TowerPart, path: str, plain: bool = True) -> Iterator[Site]:
    """Norms of queries and keys; with a `plain` softmax the bias of the key norm has no effect."""
    for name in ("q_norm", "k_norm"):
        yield from part.norm(f"{path}.{name}", "norm.qk", inert_bias=plain and name == "k_norm")


def _mlp(part: TowerPart, path: str, role: str = "mlp") -> Iterator[Site]:
    mlp = part.module(path)
    if hasattr(mlp, "gate_last"):
        half = mlp.fc1.out_features // 2
        names = ("in", "gate") if mlp.gate_last else ("gate", "in")
        rows = {f"{path}.fc1.{x}": (f"{role}.{x}", half) for x in names}
        yield from part.slices(f"{path}.fc1", f"{role}.in_gate", rows)
    else:
        for name, kind in {"fc1": "in", "fc1_g": "gate", "fc1_x": "in"}.items():
            yield from part.layer(f"{path}.{name}", f"{role}.{kind}")
    yield from part.norm(f"{path}.norm")
    yield from part.layer(f"{path}.fc2", f"{role}.out")


def _fused_block(part: TowerPart, path: str, width: int) -> Iterator[Site]:
    """A parallel block: one input layer for MLP, queries, keys and values, and one residual branch."""
    block = part.module(path)
    roles = ("mlp.in", "attn.q", "attn.k", "attn.v")
    rows = {f"{path}.{role}": (role, size) for role, size in zip(roles, block.in_split, strict=True)}
    yield from part.norm(f"{path}.in_norm")
    yield from part.slices(
        f"{path}.in_proj", "single.in", rows, inert_bias=("attn.k",) if isinstance(block.k_norm, nn.Identity) else (),
        biases={"in": f"{path}.mlp_bias"} if block.mlp_bias is not None else {},
    )  # fmt: skip
    if block.mlp_bias is not None:
        yield part.parameter(path, "mlp_bias", "bias.mlp.in")
    yield from _qk_norms(part, path)
    for name in own_parameters(block):
        if name.startswith("lambda_"):
            yield part.parameter(path, name, "scale")
    yield from part.norm(f"{path}.sub_norm")
    for name, role in {"out_proj": "single.out", "attn_out_proj": "attn.out", "mlp_out_proj": "mlp.out"}.items():
        yield from part.layer(f"{path}.{name}", role)
    if part.has(f"{path}.ls", "gamma"):
        yield part.parameter(f"{path}.ls", "gamma", "scale")
    read, normed, write = Port(f"{path}.in_norm", "in"), Port(f"{path}.in_norm", "out"), Port(f"{path}.drop_path", "out")
    yield part.branch(path, "single", read, write, width, normed=normed, **_grid(part))


def _head(part: TowerPart) -> Iterator[Site]:
    """The last norm, attention pooling, pooled features and the heads."""
    vit: Any = part.model
    yield from part.norm("norm")
    if part.module("attn_pool.kv") is not None:
        yield from _pool(part, "attn_pool")
    else:
        for path, module in part.modules_with_parameters("attn_pool"):
            yield from part.norm(path) if is_norm(module) else ()
    yield from part.norm("fc_norm")
    for name in ("head", "head_dist"):
        if part.module(name) is not None:
            yield from part.features(name, vit.num_features, Port("norm", "out"))
            yield from part.layer(name, "head")


def _pool(part: TowerPart, path: str) -> Iterator[Site]:
    """Attention pooling with a learned query."""
    pool = part.module(path)
    inert = ("pool.k",) if isinstance(pool.k_norm, nn.Identity) else ()
    for param, role in {"latent": "embed.pool", "pos_embed": "embed.position"}.items():
        if part.has(path, param):
            yield part.parameter(path, param, role)
    yield from part.layer(f"{path}.q", "pool.q")
    rows = {f"{path}.{x}": (f"pool.{x}", pool.kv.out_features // 2) for x in "kv"}
    yield from part.slices(f"{path}.kv", "pool.kv", rows, inert_bias=inert)
    yield from _qk_norms(part, path)
    yield from part.layer(f"{path}.proj", "pool.out")
    yield from part.norm(f"{path}.norm")
    yield from _mlp(part, f"{path}.mlp", "pool.mlp")

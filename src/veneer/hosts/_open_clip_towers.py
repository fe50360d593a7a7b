"""open_clip's image towers (ViT, ResNet, any timm model) and text towers (its own, any transformers model)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from veneer.injection.sites import FeatureSite, PixelSite, Port, Site, VocabularySite

from ._describe import LAYERS, TowerPart, is_norm, own_parameters
from ._open_clip_blocks import blocks, pooler
from ._within import nested_sites

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
POOL = {"q": "pool.q", "k": "pool.k", "v": "pool.v", "kv": "pool.kv", "proj": "pool.out"}
PROJECTION = {"head": "proj.out", "bias.head": "bias.proj.out"}
MLP = {"fc1": "proj.in", "fc2": "proj.out", "proj": "proj.out"}


def visual(part: TowerPart) -> Iterator[Site]:
    """The image tower at `visual`."""
    tower = part.module("visual")
    yield _pixels(part)
    if hasattr(tower, "trunk"):
        yield from _timm(part)
    elif hasattr(tower, "attnpool"):
        yield from _resnet(part)
    else:
        yield from _vit(part)
    yield _features(part, "visual", _visual_width(tower))


def _pixels(part: TowerPart) -> PixelSite:
    tower = part.module("visual")
    side = tower.image_size
    size = (*(tuple(side) if isinstance(side, (tuple, list)) else (side, side)), 3)
    mean, std = getattr(tower, "image_mean", None) or OPENAI_MEAN, getattr(tower, "image_std", None) or OPENAI_STD
    fields: dict[str, Any] = {"size": size, "mean": tuple(mean), "std": tuple(std)}
    return PixelSite(name="visual.pixels", role="pixels", port=Port("visual", "in"), **fields, **part.labels)


def _features(part: TowerPart, path: str, width: int) -> FeatureSite:
    """Features as a tower returns them: projected, before normalization."""
    port = Port(path, "out")
    return FeatureSite(name=f"{path}.features", role="features", port=port, read=port, width=width, head="", **part.labels)


def _visual_width(tower: Any) -> int:
    if hasattr(tower, "output_dim"):
        width = tower.output_dim if getattr(tower, "proj", True) is not None else tower.ln_post.normalized_shape[0]
        return int(width)
    layers = [m for m in tower.head.modules() if isinstance(m, nn.Linear)]
    return int(layers[-1].out_features if layers else tower.trunk.num_classes or tower.trunk.num_features)


def _vit(part: TowerPart) -> Iterator[Site]:
    vit = part.module("visual")
    yield from part.layer("visual.conv1", "conv.patch")
    yield part.parameter("visual", "class_embedding", "embed.class")
    yield part.parameter("visual", "positional_embedding", "embed.position")
    yield from part.norm("visual.ln_pre")
    whole = isinstance(vit.patch_dropout, nn.Identity)
    grid, patch = tuple(vit.grid_size) if whole else None, (*vit.patch_size, vit.conv1.in_channels)
    prefix_only = vit.pool_type == "tok" and not vit.output_tokens
    yield from blocks(part, "visual.transformer", prefix_only=prefix_only, prefix_tokens=1, grid=grid, patch=patch)
    yield from pooler(part, "visual.attn_pool")
    yield from pooler(part, "visual.attn_pool_contrastive")
    yield from part.norm("visual.ln_post")
    if part.has("visual", "proj"):
        yield part.parameter("visual", "proj", "proj.out")


def _resnet(part: TowerPart) -> Iterator[Site]:
    """Convolutions with their norms, block by block, and the attention pooling, which reads all of its layers."""
    for i in (1, 2, 3):
        yield from part.layer(f"visual.conv{i}", "conv.stem")
        yield from part.norm(f"visual.bn{i}")
    depth = 0
    for stage in (1, 2, 3, 4):
        for index in range(len(part.module(f"visual.layer{stage}"))):
            yield from _bottleneck(part.at(depth=depth, stage=f"stage.{stage - 1}"), f"visual.layer{stage}.{index}")
            depth += 1
    yield part.parameter("visual.attnpool", "positional_embedding", "embed.position")
    for x in ("q", "k", "v"):
        yield from part.layer(f"visual.attnpool.{x}_proj", f"pool.{x}", called=False, inert_bias=x == "k")
    yield from part.layer("visual.attnpool.c_proj", "pool.out", called=False)


def _bottleneck(part: TowerPart, path: str) -> Iterator[Site]:
    block = part.module(path)
    for i in (1, 2, 3):
        yield from part.layer(f"{path}.conv{i}", "conv.res")
        yield from part.norm(f"{path}.bn{i}")
    yield from part.layer(f"{path}.downsample.0", "conv.sample")
    yield from part.norm(f"{path}.downsample.1")
    shape = {"d_in": block.conv1.in_channels, "resamples": block.stride > 1, "layout": "NCHW"}
    yield part.stream(path, block.conv3.out_channels, **shape)


def _timm(part: TowerPart) -> Iterator[Site]:
    """The trunk's sites by its own host, except pixels and features, which belong to the tower; then the head."""
    for site in nested_sites(part.model, "visual.trunk", part.tower, part.component):
        if not isinstance(site, (PixelSite, FeatureSite)):
            yield replace(site, role=PROJECTION.get(site.role, site.role))  # the trunk's head does not output logits
    for path, module in part.modules_with_parameters("visual.head"):
        *_, kind, name = path.split(".")
        if is_norm(module):
            yield from part.norm(path)
        elif isinstance(module, nn.Linear) and kind == "pool" and name == "qkv":
            size = module.out_features // 3
            rows = {f"{path.removesuffix('qkv')}{x}": (f"pool.{x}", size) for x in "qkv"}
            yield from part.slices(path, "pool.qkv", rows, inert_bias=("pool.k",))
        elif isinstance(module, LAYERS):
            role = (POOL if kind == "pool" else MLP).get(name, "head")
            yield from part.layer(path, role, inert_bias=role == "pool.k")
        else:
            for param in own_parameters(module):
                yield part.parameter(path, param, "embed.position" if param == "pos_embed" else "embed.pool")


def text(part: TowerPart, path: str) -> Iterator[Site]:
    """The text tower: its modules are the model's own (`path` empty) or are in `text`."""
    tower = part.module(path)
    if not hasattr(tower, "token_embedding"):
        yield from _transformers(part, path)
        return
    root = f"{path}." if path else ""
    table = tower.token_embedding
    fields: dict[str, Any] = {"rows": table.num_embeddings, "width": table.embedding_dim, "argument": "text"}
    yield VocabularySite(
        name=f"{root}token_embedding.vocabulary", role="vocabulary", path=f"{root}token_embedding", ids=Port(path, "in"),
        **fields, **part.labels,
    )  # fmt: skip
    yield from part.layer(f"{root}token_embedding", "embed.token")
    for param, role in {"cls_emb": "embed.class", "positional_embedding": "embed.position"}.items():
        if part.has(path, param):
            yield part.parameter(path, param, role)
    pooling = getattr(tower, "pool_type", getattr(tower, "text_pool_type", ""))
    start = int(pooling != "last")  # SigLIP, which pools the last token, has no start token
    yield from blocks(part, f"{root}transformer", prefix_tokens=start, can_insert=False)
    yield from part.norm(f"{root}ln_final")
    yield from _projection(part, path)
    if path:
        yield _features(part, path, tower.output_dim or tower.width)


def _projection(part: TowerPart, path: str) -> Iterator[Site]:
    """A matrix parameter for x @ W, or a linear layer."""
    if part.has(path, "text_projection"):
        yield part.parameter(path, "text_projection", "proj.out")
    yield from part.layer(f"{path}.text_projection" if path else "text_projection", "proj.out")


def _transformers(part: TowerPart, path: str) -> Iterator[Site]:
    """A transformers text encoder, described by its own host, and the projection after it."""
    for site in nested_sites(part.model, f"{path}.transformer", part.tower, part.component):
        if not isinstance(site, VocabularySite):  # the tower reads the ids before, for padding
            yield site
    for name, _ in part.modules_with_parameters(f"{path}.proj"):
        yield from part.layer(name, "proj.in" if name.endswith("proj.0") else "proj.out")
    yield _features(part, path, part.module(path).output_dim)

"""timm's Swin transformers: v1, v2 and v2-CR."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from veneer.injection.host import Host, module_names
from veneer.injection.sites import Port, Site, TokenSite

from ._describe import SampleInputs, TowerPart
from ._timm import head, pixels, walk

FAMILIES = {
    "timm.models.swin_transformer.SwinTransformer", "timm.models.swin_transformer_v2.SwinTransformerV2",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr",
}  # fmt: skip
TABLES = {"relative_position_bias_table": "embed.position", "logit_scale": "scale"}


class TimmSwin(Host):
    """SwinTransformer, SwinTransformerV2 and SwinTransformerV2Cr. The stream is (batch, height, width, channels).

    `attn.qkv` has sites for its row slices, and for the whole weight if selected by name. v2 reads its weight, and adds `q_bias`
    and `v_bias`. The norms of v1 precede attention and MLP; those of v2 follow, so that a branch is read from the
    stream. An MLP receives the patches as a sequence (`NLC`) with a grid. Tokens cannot be inserted: windows fix their number.
    """

    name: ClassVar[str] = "timm_swin"
    tower: ClassVar[str] = "vision"
    library: ClassVar[str] = "timm"

    def matches(self, model: nn.Module) -> bool:
        return not FAMILIES.isdisjoint(module_names(model))

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        swin: Any = model
        part = TowerPart(model, self.tower, component)
        yield pixels(part, swin.patch_embed.img_size)
        yield from walk(part, "patch_embed", {"proj": "conv.patch"})
        depth = 0
        for i, (path, stage) in enumerate(_stages(swin)):
            inside = part.at(stage=f"stage.{i}")
            yield from _merging(inside, f"{path}.downsample")
            for j in range(len(stage.blocks)):
                yield from _block(inside.at(depth=depth), f"{path}.blocks.{j}")
                depth += 1
        yield from part.norm("norm")
        yield from head(part, "head.fc", swin.head_hidden_size)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        swin: Any = model
        height, width, channels = pixels(TowerPart(model, self.tower), swin.patch_embed.img_size).size
        return {"x": SampleInputs(model).normal(2, channels, height, width)}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {
            "swin": lambda: _build("swin_tiny_patch4_window7_224"),
            "swinv2": lambda: _build("swinv2_tiny_window8_256"),
            "swinv2_cr": lambda: _build("swinv2_cr_tiny_ns_224"),
        }


def _build(architecture: str, **options: Any) -> nn.Module:
    import timm

    shape = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "num_classes": 10}
    model: nn.Module = timm.create_model(architecture, pretrained=False, **{**shape, **options})
    return model.eval()


def _stages(swin: Any) -> list[tuple[str, Any]]:
    name = "stages" if hasattr(swin, "stages") else "layers"
    return [(f"{name}.{i}", stage) for i, stage in enumerate(getattr(swin, name))]


def _merging(part: TowerPart, path: str) -> Iterator[Site]:
    """Patch merging at the start of a stage: a norm before (v1) or after (v2) the layer that merges four patches into one."""
    merging = part.module(path)
    if isinstance(merging, nn.Identity):
        return
    yield from walk(part, path, default="embed.merge")
    layer = merging.reduction
    yield part.stream(path, layer.out_features, d_in=layer.in_features // 4, resamples=True, layout="NHWC", role="sample")


def _block(part: TowerPart, path: str) -> Iterator[Site]:
    block = part.module(path)
    width = block.dim
    grid = tuple(getattr(block, "input_resolution", None) or block.feat_size)
    norm_first = next(iter(block._modules)) == "norm1"
    for i, kind in enumerate(("attn", "mlp"), 1):
        norm, inner = f"{path}.norm{i}", f"{path}.{kind}"
        yield from part.norm(norm) if norm_first else ()
        yield from _attention(part, inner) if kind == "attn" else walk(part, inner, {"fc1": "mlp.in", "fc2": "mlp.out"})
        yield from () if norm_first else part.norm(norm)
        # attention receives its patches in windows; the stream itself is only visible at the block's input
        read = Port(norm if norm_first else path if kind == "attn" else inner, "in")
        normed, layout = Port(norm, "out") if norm_first else None, "NHWC" if kind == "attn" else "NLC"
        yield part.branch(inner, kind, read, Port(f"{path}.drop_path{i}", "out"), width, normed=normed, layout=layout, grid=grid)
    yield from part.norm(f"{path}.norm3")
    yield part.stream(path, width, layout="NHWC", grid=grid)
    yield TokenSite(
        name=f"{path}.tokens", role="tokens.block", enter=Port(path, "in"), leave=Port(path, "out"), width=width,
        can_insert=False, **part.labels,
    )  # fmt: skip


def _attention(part: TowerPart, path: str) -> Iterator[Site]:
    """Attention in windows: its layers, and the whole of it unless it compares by the cosine."""
    layers = _attention_layers(part, path)
    yield from layers if part.has(path, "logit_scale") else part.self_attention(path, layers)


def _attention_layers(part: TowerPart, path: str) -> Iterator[Site]:
    attn: Any = part.module(path)
    biases = {x: f"{path}.{x}_bias" for x in "qv"} if part.has(path, "q_bias") else {}
    # Softmax cancels a constant added to all keys, except in cosine attention, which has a logit scale.
    inert = ("attn.k",) if not part.has(path, "logit_scale") else ()
    rows = {f"{path}.{x}": (f"attn.{x}", attn.qkv.out_features // 3) for x in "qkv"}
    read = bool(biases) and not attn.qkv_bias_separate
    yield from part.slices(f"{path}.qkv", "attn.qkv", rows, called=not read, inert_bias=inert, biases=biases)
    for x, bias in biases.items():
        yield part.parameter(path, bias.rpartition(".")[2], f"bias.attn.{x}")
    for param, role in TABLES.items():
        if part.has(path, param):
            yield part.parameter(path, param, role)
    yield from walk(part, f"{path}.cpb_mlp", default="embed.position")
    yield from part.layer(f"{path}.meta_mlp.fc1", "embed.position")
    # softmax cancels a constant added to all scores of a head
    yield from part.layer(f"{path}.meta_mlp.fc2", "embed.position", inert_bias=True)
    yield from part.layer(f"{path}.proj", "attn.out")

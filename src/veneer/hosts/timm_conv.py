"""Convolutional networks of timm: ResNet, EfficientNet, MobileNetV3 and V4, RegNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from veneer.injection.host import Host, module_names
from veneer.injection.seams.seam import Seam
from veneer.injection.sites import Port, Site

from ._describe import SampleInputs, TowerPart, ends_with_norm, own_modules
from ._timm import head, pixels, walk

FAMILIES = {
    "timm.models.resnet.ResNet", "timm.models.efficientnet.EfficientNet", "timm.models.mobilenetv3.MobileNetV3",
    "timm.models.regnet.RegNet",
}  # fmt: skip
STEMS = ("conv_stem", "conv1", "stem", "bn1", "maxpool")
LAST = ("conv_head", "final_conv", "bn2", "norm_head")
ATTENTION = {"query.proj": "attn.q", "key.proj": "attn.k", "value.proj": "attn.v", "output.proj": "attn.out", "proj": "attn.out"}
SE_INPUTS = ("conv_reduce", "fc1", "mlp_add.fc1", "mlp_scale.fc1")
BRANCH_ENDS = (
    "drop_path",
    "se",
    "bn3",
    "bn2",
    "conv3",
    "conv2",
)  # end of a branch: the first of these that exists
GRID_NEUTRAL = ("se", "attn", "downsample")  # do not determine whether a block keeps its grid
SIDE = 64  # image size of the sample; any size works


class TimmConv(Host):
    """ResNet, EfficientNet, MobileNetV3 and RegNet, with every block type they use.

    Includes ResNeXt, SE and wide ResNets; MobileNetV2, MNASNet, MixNet and the `tf_` and `lite` EfficientNets; MobileNetV4,
    LCNet and FBNetV3. The stream is (batch, channels, height, width). A block is one residual branch if it keeps channels
    and grid and ends in a sum; other blocks have none. Most norm modules include their activation; their sites have
    `called=False`, and their parameters are read.
    """

    name: ClassVar[str] = "timm_conv"
    tower: ClassVar[str] = "vision"
    library: ClassVar[str] = "timm"

    def matches(self, model: nn.Module) -> bool:
        return not FAMILIES.isdisjoint(module_names(model))

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        net: Any = model
        part = TowerPart(model, self.tower, component)
        yield pixels(part)
        for name in STEMS:
            yield from walk(part, name, default="conv.stem")
        depth = 0
        for i, (stage, blocks) in enumerate(_stages(net)):
            for path in blocks:
                yield from _block(part.at(depth=depth, stage=f"stage.{i}"), f"{stage}.{path}")
                depth += 1
        for name in LAST:
            yield from walk(part, name, default="conv.pw")
        path = next(path for path in ("classifier", "head.fc", "fc") if part.module(path) is not None)
        yield from head(part, path, net.head_hidden_size)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        channels = pixels(TowerPart(model, self.tower)).size[2]
        return {"x": SampleInputs(model).normal(2, channels, SIDE, SIDE)}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {
            "resnet": lambda: _resnet("resnet18", channels=(8, 16, 16, 24), layers=(1, 2, 1, 1)),
            "resnext_se": lambda: _resnet("seresnext50_32x4d", cardinality=4, base_width=16),
            "efficientnet": lambda: _mobile("EfficientNet", "ds_r1_k3_s1_e1_c8_se0.25 ir_r2_k3_s2_e3_c16_se0.25"),
            "efficientnet_tf": lambda: _mobile("EfficientNet", "ds_r1_k3_s1_e1_c8 ir_r2_k5_s2_e3_c16", pad_type="same"),
            "mobilenetv3": lambda: _mobile("MobileNetV3", "ds_r1_k3_s1_e1_c8_nre ir_r2_k5_s2_e3_c16_se0.25 cn_r1_k1_s1_c24"),
            "regnet": lambda: _regnet(),
        }


def _build(architecture: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(architecture, pretrained=False, **{"num_classes": 10, **options})
    return model.eval()


def _resnet(architecture: str, **options: Any) -> nn.Module:
    return _build(
        architecture, **{"channels": (8, 8, 8, 8), "layers": (2, 1, 1, 1), "stem_width": 8, "stem_type": "deep", **options}
    )


def _mobile(family: str, blocks: str, **options: Any) -> nn.Module:
    """EfficientNet or MobileNetV3 with one block definition per stage."""
    from importlib import import_module

    from timm.models._efficientnet_builder import decode_arch_def

    cls = getattr(import_module(f"timm.models.{family.lower()}"), family)
    shape = {"num_classes": 10, "stem_size": 8, "num_features": 24, "act_layer": nn.Hardswish}
    model: nn.Module = cls(decode_arch_def([[block] for block in blocks.split()]), **{**shape, **options})
    return model.eval()


def _regnet(**options: Any) -> nn.Module:
    shape = {"depth": 5, "w0": 8, "wa": 8.0, "wm": 1.5, "group_size": 4, "stem_width": 8, "act_layer": "silu"}
    return _build("regnety_002", **{**shape, **options})


def _stages(net: Any) -> Iterator[tuple[str, list[str]]]:
    """The path of each stage and the names of its blocks."""
    if hasattr(net, "blocks"):
        names = [f"blocks.{i}" for i in range(len(net.blocks))]
    else:
        names = [name for name, _ in net.named_children() if name[:-1] in ("layer", "s")]
    for name in names:
        yield name, [child for child, _ in net.get_submodule(name).named_children()]


def _block(part: TowerPart, path: str) -> Iterator[Site]:
    block = part.module(path)
    children = {name: child for name, child in block.named_children() if not isinstance(child, Seam)}
    yield from part.layer(f"{path}.routing_fn", "conv.route")  # registered last but called first
    for name in children:
        yield from _child(part, f"{path}.{name}", name)
    convs = [conv for name, child in children.items() if name not in ("se", "downsample") for conv in _convs(child)]
    width = convs[-1].out_channels
    yield from _branch(part, path, width)
    resamples = any(_strides(child) for name, child in children.items() if name not in GRID_NEUTRAL)
    yield part.stream(path, width, d_in=convs[0].in_channels, resamples=resamples, layout="NCHW")


def _child(part: TowerPart, path: str, name: str) -> Iterator[Site]:
    """Layers and norms of one child of a block."""
    if name == "se":
        # global context weights pixels by a softmax, which cancels a constant added to all of them
        yield from part.layer(f"{path}.conv_attn", "se.in", inert_bias=True)
        yield from walk(part, path, dict.fromkeys(SE_INPUTS, "se.in"), "se.out", besides=("conv_attn",))
    elif name == "attn":
        # softmax cancels a constant added to all keys
        yield from part.norm(f"{path}.key.norm", inert_bias=True)
        yield from walk(part, path, ATTENTION, besides=("key.norm",))
    elif name != "routing_fn":
        yield from walk(part, path, default="conv.sample" if name == "downsample" else "")


def _strides(module: nn.Module) -> bool:
    """True if a convolution or pooling at or below a module is strided."""
    strides = [getattr(m, "stride", 1) for _, m in own_modules(module)]
    return any(max(stride) > 1 if isinstance(stride, (tuple, list)) else stride > 1 for stride in strides)


def _convs(module: Any) -> Iterator[Any]:
    """Convolutions at and below a module; those with several kernels count as one."""
    if hasattr(module, "in_channels") and not hasattr(module, "conv"):
        yield module
    elif isinstance(module, nn.Module) and not isinstance(module, Seam):
        for child in module.children():
            yield from _convs(child)


def _branch(part: TowerPart, path: str, width: int) -> Iterator[Site]:
    """The residual branch, if the block itself adds it to its input."""
    block = part.module(path)
    if hasattr(block, "has_skip"):  # blocks of EfficientNet and MobileNet
        adds, read = block.has_skip, Port(path, "in")
    elif hasattr(block, "norm1"):  # RegNet's pre-norm block
        adds, read = isinstance(block.downsample, nn.Identity), Port(f"{path}.conv1", "in")
    else:
        adds, read = isinstance(block.downsample, (nn.Identity, type(None))), Port(path, "in")
        regnet = hasattr(block.conv1, "conv") and hasattr(block, "act3")
        adds = adds and not (block.downsample is None and regnet)  # in RegNet, None means no sum
    if not adds:
        return
    ends = BRANCH_ENDS[1:] if hasattr(block, "radix") else BRANCH_ENDS  # ResNeSt's drop_path is on the other path
    write = next(f"{path}.{name}" for name in ends if getattr(block, name, None) is not None)
    if hasattr(block, "attn"):
        norm = f"{path}.norm"
        normed = Port(norm, "out") if ends_with_norm(block.norm) else None
        fields: dict[str, Any] = {"role": "attn", "read": Port(norm, "in"), "normed": normed}
    else:
        fields = {"role": "conv", "read": read}
    yield part.branch(path, write=Port(write, "out"), width=width, layout="NCHW", **fields)

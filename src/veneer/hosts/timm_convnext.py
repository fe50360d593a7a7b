"""timm's ConvNeXt, v1 and v2, with linear or 1×1 convolutional MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from veneer.injection.host import Host, module_names
from veneer.injection.sites import Port, Site

from ._describe import SampleInputs, TowerPart
from ._timm import head, pixels, walk

SIDE = 64  # image size of the sample; any size works


class TimmConvNeXt(Host):
    """ConvNeXt: blocks of a depthwise convolution, a norm and an MLP, on a stream of (batch, channels, height, width).

    A block is one residual branch, read from the stream, because its norm is inside. Its MLP has the roles `mlp.in` and `mlp.out`
    whether linear or convolutional; v2's response norm between them adds its input, so only its parameters have sites, not
    the norm itself.
    """

    name: ClassVar[str] = "timm_convnext"
    tower: ClassVar[str] = "vision"
    library: ClassVar[str] = "timm"

    def matches(self, model: nn.Module) -> bool:
        return "timm.models.convnext.ConvNeXt" in module_names(model)

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        convnext: Any = model
        part = TowerPart(model, self.tower, component)
        yield pixels(part)
        yield from walk(part, "stem", default="conv.stem")
        depth = 0
        for i, stage in enumerate(convnext.stages):
            inside = part.at(stage=f"stage.{i}")
            yield from walk(inside, f"stages.{i}.downsample", default="conv.sample")
            for j in range(len(stage.blocks)):
                yield from _block(inside.at(depth=depth), f"stages.{i}.blocks.{j}")
                depth += 1
        yield from part.norm("norm_pre")
        yield from part.norm("head.norm")
        yield from part.layer("head.pre_logits.fc", "pool.mlp.in")
        yield from head(part, "head.fc", convnext.head_hidden_size)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        channels = pixels(TowerPart(model, self.tower)).size[2]
        return {"x": SampleInputs(model).normal(2, channels, SIDE, SIDE)}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {
            "convnext": lambda: _build("convnext_tiny", ls_init_value=0.1),
            "convnext_conv_mlp": lambda: _build("convnext_atto", ls_init_value=0.1),
            "convnextv2": lambda: _build("convnextv2_tiny"),
        }


def _build(architecture: str, **options: Any) -> nn.Module:
    import timm

    shape = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "kernel_sizes": 3, "num_classes": 10}
    model: nn.Module = timm.create_model(architecture, pretrained=False, **{**shape, **options})
    return model.eval()


def _block(part: TowerPart, path: str) -> Iterator[Site]:
    block = part.module(path)
    if part.has(path, "gamma"):
        yield part.parameter(path, "gamma", "scale")
    yield from part.layer(f"{path}.conv_dw", "conv.dw")
    yield from part.norm(f"{path}.norm")
    yield from part.layer(f"{path}.mlp.fc1", "mlp.in")
    if part.has(f"{path}.mlp.grn", "weight"):
        yield part.parameter(f"{path}.mlp.grn", "weight", "norm")
        channel = block.mlp.grn.channel_dim
        yield part.bias(f"{path}.mlp.grn", "norm", tuple(block.mlp.grn.bias.shape), channel_dim=channel)
    yield from part.layer(f"{path}.mlp.fc2", "mlp.out")
    yield from walk(part, f"{path}.shortcut", default="conv.sample")
    dw = block.conv_dw
    resamples = max(dw.stride) > 1
    if isinstance(block.shortcut, nn.Identity):
        read, write = Port(f"{path}.conv_dw", "in"), Port(f"{path}.drop_path", "out")
        yield part.branch(path, "conv", read, write, dw.out_channels, layout="NCHW")
    yield part.stream(path, dw.out_channels, d_in=dw.in_channels, resamples=resamples, layout="NCHW")

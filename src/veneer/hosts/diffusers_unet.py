"""The UNets of Stable Diffusion 1, 2 and XL: diffusers' `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count, zip_longest
from typing import Any, ClassVar

from torch import nn

from veneer.injection.attention_sites import TextReaders
from veneer.injection.host import Host, module_names
from veneer.injection.sites import Site

from ._describe import SampleInputs, TowerPart
from ._diffusers import NAMES, attention, basic_block, is_attention, processor_order, remaining
from ._diffusers_control import residual_site, skips

RESNET = {"conv1": "conv.res", "conv2": "conv.res", "conv_shortcut": "conv.res", "time_emb_proj": "time.res"}
ROLES = {
    **RESNET, "linear": "time.res", "conv": "conv.sample", "proj_in": "proj.in", "proj_out": "proj.out",
    "time_embedding": "time.embed", "add_embedding": "time.embed", "class_embedding": "class.embed", "conv_in": "conv.io",
    "conv_out": "conv.io", "encoder_hid_proj": "embed.context",
}  # fmt: skip
BEFORE = ("time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj", "conv_in")
AFTER = ("conv_norm_out", "conv_out")


class DiffusersUNet(Host):
    """UNet2DConditionModel: every site, found by walking the model's blocks, for any configuration.

    Modules that need additional inputs (GLIGEN's `position_net` and `fuser`, IP-Adapter's processors) have no sites.
    """

    name: ClassVar[str] = "diffusers_unet"
    tower: ClassVar[str] = "unet"
    library: ClassVar[str] = "diffusers"

    def matches(self, model: nn.Module) -> bool:
        return any(n.startswith("diffusers.") and n.endswith(".UNet2DConditionModel") for n in module_names(model))

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        part, order, depth = TowerPart(model, self.tower, component), processor_order(model), count()
        for name in BEFORE:
            yield from remaining(part, name, ROLES)
        for stage, path in stages(model):
            yield from _block(part.at(stage=stage), path, order, depth)
        for name in AFTER:
            yield from remaining(part, name, ROLES)
        yield residual_site(part, components)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        bare: Any = model
        draw, unet = SampleInputs(model), bare.config
        side = 2 * skips(model)[1][-1]
        context = unet["encoder_hid_dim"] if unet["encoder_hid_dim_type"] == "text_proj" else unet["cross_attention_dim"]
        inputs: dict[str, Any] = {
            "sample": draw.normal(2, unet["in_channels"], side, side),
            "timestep": draw.tensor([37, 801]),
            "encoder_hidden_states": draw.normal(2, 5, context if isinstance(context, int) else context[0]),
        }
        if unet["time_cond_proj_dim"] is not None:
            inputs["timestep_cond"] = draw.normal(2, unet["time_cond_proj_dim"])
        if unet["class_embed_type"] in ("projection", "simple_projection"):
            inputs["class_labels"] = draw.normal(2, unet["projection_class_embeddings_input_dim"])
        elif unet["class_embed_type"] is not None or unet["num_class_embeds"] is not None:
            inputs["class_labels"] = draw.tensor([1, 3])
        if unet["addition_embed_type"] == "text_time":
            width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
            sizes = draw.tensor([[64.0, 48.0, 0.0, 8.0, 64.0, 64.0]] * 2)
            inputs["added_cond_kwargs"] = {"text_embeds": draw.normal(2, width), "time_ids": sizes}
        return inputs

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        linear = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
        xl = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 68,
            "transformer_layers_per_block": (1, 2), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }  # fmt: skip
        return {"sd1": lambda: _build(), "sd2": lambda: _build(**linear), "sdxl": lambda: _build(**linear, **xl)}


def _build(**options: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    shape: dict[str, Any] = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 24,
        "attention_head_dim": 4, "sample_size": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    model: Any = UNet2DConditionModel(**{**shape, **options})
    return model.eval()


def text_readers(components: Mapping[str, Any]) -> TextReaders | None:
    """The modules of a pipeline's UNet that read the states of its text encoders, or None if they are read in another way."""
    unet: Any = components.get("unet")
    if not isinstance(unet, nn.Module) or not DiffusersUNet().matches(unet):
        return None
    config: Any = unet.config
    encoders = [components.get(name) for name in ("text_encoder", "text_encoder_2")]
    widths = tuple(encoder.config.hidden_size for encoder in encoders if encoder is not None)
    blocks = (module for _, path in stages(unet) for module in unet.get_submodule(path).modules())
    cross = tuple(module for module in blocks if is_attention(module) and NAMES.is_cross(module))
    if config["encoder_hid_dim_type"] is not None or {module.cross_attention_dim for module in cross} != {sum(widths)}:
        return None
    if len({*widths}) < len(widths):  # the width of states must tell which encoder wrote one for each layer
        return None
    others = (unet.get_submodule("add_embedding"),) if config["addition_embed_type"] == "text" else ()
    return TextReaders(cross, others, widths)


def stages(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Stage and path of each block, in the order of the forward pass."""
    unet: Any = model
    yield from ((f"down.{i}", f"down_blocks.{i}") for i in range(len(unet.down_blocks)))
    if unet.mid_block is not None:
        yield "mid", "mid_block"
    yield from ((f"up.{i}", f"up_blocks.{i}") for i in range(len(unet.up_blocks)))


def _block(part: TowerPart, path: str, order: dict[str, int], depth: Iterator[int]) -> Iterator[Site]:
    """A block: resnets and attentions alternating, then its down- or upsampler."""
    block = part.module(path)
    resnets, attentions = (range(len(getattr(block, n, None) or ())) for n in ("resnets", "attentions"))
    for i, j in zip_longest(resnets, attentions):
        if i is not None:
            yield from _resnet(part, f"{path}.resnets.{i}")
        if j is not None and part.module(f"{path}.attentions.{j}") is not None:
            yield from _transformer(part, f"{path}.attentions.{j}", order, depth)
    for name in ("downsamplers", "upsamplers"):
        yield from remaining(part, f"{path}.{name}", ROLES)


def _resnet(part: TowerPart, path: str) -> Iterator[Site]:
    for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"):
        yield from remaining(part, f"{path}.{name}", ROLES)


def _transformer(part: TowerPart, path: str, order: dict[str, int], depth: Iterator[int]) -> Iterator[Site]:
    """A `Transformer2DModel`; in other configurations a plain attention, or a container of these."""
    module = part.module(path)
    if is_attention(module):
        yield from attention(part.at(depth=next(depth)), path, order[path])
    elif hasattr(module, "transformer_blocks"):
        yield from part.norm(f"{path}.norm")
        yield from part.layer(f"{path}.proj_in", "proj.in")
        for i in range(len(module.transformer_blocks)):
            yield from basic_block(part.at(depth=next(depth)), f"{path}.transformer_blocks.{i}", order)
        yield from part.layer(f"{path}.proj_out", "proj.out")
    elif isinstance(module, nn.Module):
        children = list(module.named_children())
        for name, _ in children:
            yield from _transformer(part, f"{path}.{name}", order, depth)
        if not children:
            yield from remaining(part, path, ROLES)

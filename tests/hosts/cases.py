"""Real small models of every host, with a trace of one forward pass of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.hosts import clips, nets, vision_models
from veneer.hosts._timm_fallback import tiny
from veneer.injection.host import Host
from veneer.injection.registry import hosts
from veneer.injection.sites import Site
from veneer.testing.copies import cast_model

HOSTS = (
    "diffusers_unet", "diffusers_dit", "clip_text", "timm_vit", "timm_swin", "timm_convnext", "timm_conv", "timm_fallback",
    "open_clip", "transformers_vit",
)  # fmt: skip


def _unet(**options: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    shape: dict[str, Any] = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 24,
        "attention_head_dim": 4, "sample_size": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**{**shape, **options})


def _sd35() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip


def _fused(host: str, key: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = hosts.get(host)().tiny()[key]()
        model.fuse_qkv_projections()
        return model

    return build


def _unfused() -> nn.Module:
    model: Any = _fused("diffusers_unet", "sd1")()
    model.unfuse_qkv_projections()
    return model


def _vit(architecture: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    import timm

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0, "num_classes": 10}
    return timm.create_model(architecture, pretrained=False, **{**shape, **options})


def _block(name: str, **options: Any) -> Callable[..., nn.Module]:
    def build(**more: Any) -> nn.Module:
        from timm.models import vision_transformer

        return getattr(vision_transformer, name)(**{**more, **options})

    return build


def _swiglu(**options: Any) -> nn.Module:
    from timm.layers import SwiGLUPacked

    return SwiGLUPacked(**options)


def _t5_ungated() -> nn.Module:
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config)


def _hidden_text_model() -> nn.Module:
    """The layout of transformers 4, where CLIPTextModel keeps its parts under `text_model`."""
    import transformers

    inner = hosts.get("clip_text")().tiny()["clip"]()

    class CLIPTextModel(nn.Module):
        def __init__(self, text_model: Any) -> None:
            super().__init__()
            self.text_model, self.config = text_model, text_model.config

        def forward(self, input_ids: Tensor) -> Any:
            return self.text_model(input_ids=input_ids)

    CLIPTextModel.__module__ = transformers.CLIPTextModel.__module__
    return CLIPTextModel(inner)


SIMPLE = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"), "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
UNCOMMON: dict[tuple[str, str], Callable[[], nn.Module]] = {
    ("diffusers_unet", "deepfloyd"): lambda: _unet(
        **SIMPLE,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        encoder_hid_dim=20,
        encoder_hid_dim_type="text_proj",
    ),
    ("diffusers_unet", "classes"): lambda: _unet(num_class_embeds=7, time_cond_proj_dim=12, layers_per_block=2),
    ("diffusers_unet", "upscaler"): lambda: _unet(class_embed_type="timestep", only_cross_attention=(True, False)),
    ("diffusers_unet", "no_middle"): lambda: _unet(mid_block_type=None),
    ("diffusers_unet", "fused"): _fused("diffusers_unet", "sd1"),
    ("diffusers_unet", "unfused"): _unfused,
    ("diffusers_dit", "sd35"): _sd35,
    ("diffusers_dit", "flux_fused"): _fused("diffusers_dit", "flux"),
    ("diffusers_dit", "sd3_fused"): _fused("diffusers_dit", "sd3"),
    ("diffusers_dit", "pixart_fused"): _fused("diffusers_dit", "pixart"),
    ("clip_text", "t5_ungated"): _t5_ungated,
    ("clip_text", "text_model"): _hidden_text_model,
    ("timm_vit", "parallel"): lambda: _vit(block_fn=_block("ParallelScalingBlock"), init_values=0.1),
    ("timm_vit", "parallel_unbiased"): lambda: _vit(block_fn=_block("ParallelScalingBlock", fuse_out_proj=True), qkv_bias=False),
    ("timm_vit", "parallel_differential"): lambda: _vit(block_fn=_block("DiffParallelScalingBlock")),
    ("timm_vit", "three_things"): lambda: _vit(block_fn=_block("ParallelThingsBlock"), init_values=0.1),
    ("timm_vit", "post_norm"): lambda: _vit(block_fn=_block("ResPostBlock")),
    ("timm_vit", "siglip"): lambda: _vit("vit_base_patch16_siglip_224"),
    ("timm_vit", "swiglu_qk_norm"): lambda: _vit(mlp_layer=_swiglu, qk_norm=True, scale_attn_norm=True, pre_norm=True),
    ("timm_vit", "differential"): lambda: _vit(attn_layer="diff"),
    ("timm_vit", "prr"): lambda: _vit(global_pool="prr", num_classes=0),
    ("timm_vit", "beit_shared"): lambda: _vit("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    ("timm_vit", "eva01"): lambda: _vit("eva_giant_patch14_224"),
    ("timm_vit", "eva_post_norm"): lambda: _vit("eva02_tiny_patch14_224", use_post_norm=True, swiglu_mlp=True, scale_mlp=False),
    ("timm_vit", "eva_unfused"): lambda: _vit("eva02_tiny_patch14_224", qkv_fused=False),
    ("timm_vit", "dinov3"): lambda: _vit("vit_small_patch16_dinov3", depth=2),
    ("timm_vit", "rope_mixed"): lambda: _vit("vit_small_patch16_rope_mixed_224"),
}
UNCOMMON |= {("transformers_vit", key): build for key, build in vision_models.UNCOMMON.items()}
UNCOMMON |= {("open_clip", key): build for key, build in clips.UNCOMMON.items()}
UNCOMMON |= {("timm_fallback", key): build for key, build in tiny.UNCOMMON.items()}
UNCOMMON |= {(host, key): build for host, builders in nets.UNCOMMON.items() for key, build in builders.items()}
TINY = [(host, key) for host in HOSTS for key in hosts.get(host)().tiny()]
ALL = [*TINY, *UNCOMMON]


@dataclass(frozen=True)
class Case:
    """A model in float64 with all parameters perturbed, its sites, and one traced pass."""

    host: Host
    model: nn.Module
    sites: tuple[Site, ...]
    inputs: dict[tuple[str, str], tuple[Any, ...]]
    tensors: dict[tuple[str, str], Tensor]
    order: dict[tuple[str, str], int]

    def called(self, path: str) -> bool:
        return (path, "out") in self.order


def build(host: str, key: str) -> nn.Module:
    """A tiny or an uncommon model, seeded."""
    torch.manual_seed(0)
    tiny = hosts.get(host)().tiny()
    built = (tiny[key] if key in tiny else UNCOMMON[host, key])().eval()
    model = cast_model(hosts.get(host)(), built, torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@functools.cache
def case(host: str, key: str) -> Case:
    """A model with its sites and trace."""
    model, described = build(host, key), hosts.get(host)()
    inputs, tensors, order = {}, {}, {}
    handles = []

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        order.setdefault((path, "in"), len(order))
        inputs.setdefault((path, "in"), (args, kwargs))
        first = args[0] if args else next(iter(kwargs.values()), None)
        tensors.setdefault((path, "in"), first)

    def after(path: str, module: nn.Module, args: Any, output: Any) -> None:
        order.setdefault((path, "out"), len(order))
        tensors.setdefault((path, "out"), output[0] if isinstance(output, tuple) else output)

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(functools.partial(before, path), with_kwargs=True))
        handles.append(module.register_forward_hook(functools.partial(after, path)))
    with torch.no_grad():
        model(**described.sample(model))
    for handle in handles:
        handle.remove()
    return Case(described, model, tuple(described.sites(model)), inputs, tensors, order)


def outputs(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in a model's output."""
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from outputs(item)
    elif hasattr(value, "to_tuple"):
        yield from outputs(value.to_tuple())
    elif hasattr(value, "sample"):
        yield value.sample

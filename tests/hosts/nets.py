"""Uncommon members of timm's families with a grid: Swin, ConvNeXt and convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def _swin(architecture: str, **options: Any) -> nn.Module:
    shape = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
    return timm_model(architecture, **{**shape, **options})


def _convnext(architecture: str = "convnext_tiny", **options: Any) -> nn.Module:
    shape = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "kernel_sizes": 3, "num_classes": 10, "ls_init_value": 0.1}
    return timm_model(architecture, **{**shape, **options})


def _resnet(architecture: str = "resnet18", **options: Any) -> nn.Module:
    shape = {"channels": (8, 16, 16, 16), "layers": (1, 2, 1, 1), "stem_width": 8, "num_classes": 10}
    return timm_model(architecture, **{**shape, **options})


def _regnet(architecture: str = "regnety_002", **options: Any) -> nn.Module:
    shape = {"depth": 5, "w0": 8, "wa": 8.0, "wm": 1.5, "group_size": 4, "stem_width": 8, "num_classes": 10}
    return timm_model(architecture, **{**shape, **options})


def _mobile(blocks: str, family: str = "EfficientNet", **options: Any) -> nn.Module:
    """EfficientNet or MobileNetV3 of one block definition a stage."""
    import timm.models
    from timm.models._efficientnet_builder import decode_arch_def

    cls = getattr(getattr(timm.models, family.lower()), family)
    shape: dict[str, Any] = {"num_classes": 10, "stem_size": 8, "num_features": 24, "act_layer": nn.SiLU}
    return cls(decode_arch_def([[block] for block in blocks.split()]), **{**shape, **options})


def timm_model(architecture: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(architecture, pretrained=False, **options)


def _layer(name: str) -> Any:
    import timm.layers

    return getattr(timm.layers, name)


UNCOMMON: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "timm_swin": {
        "unbiased": lambda: _swin("swin_tiny_patch4_window7_224", qkv_bias=False),
        "padded": lambda: _swin("swin_tiny_patch4_window7_224", img_size=28, num_classes=0),
        "v2_unbiased": lambda: _swin("swinv2_tiny_window8_256", qkv_bias=False),
        "cr_extra_norms": lambda: _swin("swinv2_cr_tiny_224", extra_norm_period=1, init_values=None),
    },
    "timm_convnext": {
        "norm_first": lambda: _convnext(head_norm_first=True),
        "clip_head": lambda: _convnext(head_hidden_size=20, conv_bias=False),
        "overlapping_stem": lambda: _convnext(stem_type="overlap_act", norm_layer="rmsnorm", ls_init_value=None),
        "dilated": lambda: _convnext("convnext_atto", output_stride=8, norm_layer="simplenorm"),
        "v2_conv_mlp": lambda: _convnext("convnextv2_atto", conv_mlp=True, ls_init_value=None),
        "batch_norm": lambda: _convnext(conv_mlp=True, norm_layer="batchnorm2d", num_classes=0),
    },
    "timm_conv": {
        "wide_dilated": lambda: _resnet("wide_resnet50_2", output_stride=8),
        "drop_path": lambda: _resnet(drop_path_rate=0.2, drop_block_rate=0.1),
        "blur": lambda: _resnet("resnetblur18"),
        "eca_average": lambda: _resnet("ecaresnet26t", layers=(1, 1, 2, 1)),
        "strided_stem": lambda: _resnet(replace_stem_pool=True, num_classes=0),
        "effective_se": lambda: _resnet(block_args={"attn_layer": "ese"}),
        "group_norm": lambda: _resnet(norm_layer="groupnorm1"),
        "global_context": lambda: _resnet(block_args={"attn_layer": partial(_layer("GlobalContext"), rd_ratio=1.0)}),
        "selective_kernels": lambda: _resnet("skresnet18", block_args={"sk_kwargs": {"rd_channels": 8, "split_input": True}}),
        "selective_bottlenecks": lambda: _resnet("skresnext50_32x4d", cardinality=2, base_width=32, layers=(1, 1, 2, 1)),
        "split_attention": lambda: _resnet("resnest14d", stem_type="deep", base_width=32, layers=(1, 1, 2, 1)),
        "split_dropped": lambda: _resnet("resnest50d_1s4x24d", layers=(1, 1, 2, 1), drop_path_rate=0.2),
        "scales": lambda: _resnet("res2net50_26w_4s", layers=(1, 1, 2, 1), base_width=32, drop_path_rate=0.2),
        "edge": lambda: _mobile("cn_r2_k3_s1_e1_c8_skip er_r2_k3_s2_e3_c16_se0.25"),
        "kernels_of_many_sizes": lambda: _mobile("ds_r1_k3_s1_e1_c8 ir_r2_k3.5_a1.1_p1.1_s2_e6_c16"),
        "routed": lambda: _mobile("ds_r1_k3_s1_e1_c8 ir_r2_k3_s2_e3_c16_cc4"),
        "space_to_depth": lambda: _mobile("ds_r1_k3_s1_e1_c8 ir_r1_k3_s1_d1_e3_c16 ir_r1_k3_s1_e3_c16_noskip"),
        "blurred": lambda: _mobile("ir_r2_k3_s2_e3_c16", aa_layer="blurpc"),
        "grouped_norm": lambda: _mobile("ir_r2_k3_s2_e3_c16_gs4", norm_layer=_layer("GroupNorm1Act")),
        "layer_norm": lambda: _mobile("ir_r2_k3_s2_e3_c16", norm_layer=_layer("LayerNormAct2d")),
        "evolved_norm": lambda: _mobile("ir_r2_k3_s2_e3_c16", norm_layer=partial(_layer("EvoNorm2dS0"), group_size=8)),
        "no_head_conv": lambda: _mobile("ir_r2_k3_s2_e3_c16", num_features=0, num_classes=0),
        "mobilenetv4": lambda: _mobile(
            "uir_r1_a3_k5_s2_e4_c16 uir_r2_a0_k3_s1_e4_c16 mqa_r1_k3_h2_s1_v2_d8_c16 mha_r1_k3_h2_s1_d8_c16 cn_r1_k1_s1_c24",
            "MobileNetV3",
            head_norm=True,
            layer_scale_init_value=0.1,
        ),
        "regnet_norm_first": lambda: _regnet("regnetv_040"),
        "regnet_linear": lambda: _regnet("regnetz_005", num_features=24),
        "regnet_no_shortcut": lambda: _regnet(downsample=None),
    },
}

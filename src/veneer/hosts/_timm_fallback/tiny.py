"""Small models of the fallback host, one for each way in which timm's other families are built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

SIDE = 32


def build(architecture: str, **options: Any) -> nn.Module:
    """A timm architecture with other sizes, for images of 32 pixels, or `img_size`, and 10 classes."""
    import timm

    return _configured(
        timm.create_model(architecture, pretrained=False, num_classes=10, **options), options.get("img_size", SIDE)
    )


def build_class(path: str, **options: Any) -> nn.Module:
    """A class of `timm.models`, `module.Class`, with other sizes, which its architectures fix; for images of 32 pixels."""
    module, _, name = path.rpartition(".")
    return _configured(getattr(import_module(f"timm.models.{module}"), name)(num_classes=10, **options))


def _configured(model: Any, side: int = SIDE) -> nn.Module:
    model.pretrained_cfg = {"input_size": (3, side, side), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    network: nn.Module = model.eval()
    return network


def _group_norm() -> Any:
    from timm.layers.norm_act import GroupNormAct

    return partial(GroupNormAct, num_groups=8)


def _resnet() -> nn.Module:
    return build_class(
        "resnetv2.ResNetV2", layers=(1, 1), channels=(16, 24), stem_chs=8, bottle_ratio=0.5, norm_layer=_group_norm()
    )


def _poolformer() -> nn.Module:
    mixer = import_module("timm.models.metaformer").Pooling
    return build_class("metaformer.MetaFormer", depths=(1, 1), dims=(8, 16), token_mixers=mixer)


def _caformer() -> nn.Module:
    module = import_module("timm.models.metaformer")
    mixers, norms = (module.SepConv, module.Attention), (module.LayerNorm2dNoBias, module.LayerNormNoBias)
    return build_class(
        "metaformer.MetaFormer", depths=(1, 1), dims=(8, 32), token_mixers=mixers, norm_layers=norms, use_mlp_head=True
    )


GHOST = [[[3, 8, 8, 0, 1]], [[3, 24, 12, 0.25, 2]], [[3, 36, 12, 0.25, 1]]]
SMALL_VIT = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
LEVIT = {"img_size": 64, "embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 2), "key_dim": 8}
COAT = {"img_size": 64, "embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 2)}
COATNET = {"img_size": SIDE, "depths": (1, 1), "embed_dim": (32, 32), "stem_width": 8, "block_type": ("C", "T")}
NFNET = {"depths": (1, 1), "channels": (16, 24), "stem_chs": 16, "group_size": 8, "num_features": 32}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "ghostnet": partial(build_class, "ghostnet.GhostNet", cfgs=GHOST),
    "xcit": partial(build, "xcit_nano_12_p16_224", img_size=SIDE, embed_dim=16, depth=2, num_heads=2, cls_attn_layers=1),
    "nfnet": partial(build, "dm_nfnet_f0", **NFNET),
    "resnetv2": _resnet,
}
"""Depthwise convolutions with gates; attention; standardized weights with gains; a convolution as the head."""

CORE = ("ghostnet",)

UNCOMMON: dict[str, Callable[[], nn.Module]] = {
    "cait": partial(build, "cait_xxs24_224", **SMALL_VIT),
    "levit": partial(build, "levit_128s", **LEVIT),
    "mixer": partial(build_class, "mlp_mixer.MlpMixer", img_size=SIDE, patch_size=8, num_blocks=2, embed_dim=24),
    "tnt": partial(
        build, "tnt_s_legacy_patch16_224", img_size=SIDE, embed_dim=24, inner_dim=8, depth=2, num_heads_inner=2, num_heads_outer=2
    ),
    "caformer": _caformer,
    "convit": partial(build, "convit_tiny", **{**SMALL_VIT, "embed_dim": 6, "local_up_to_layer": 1}),
    "poolformer": _poolformer,
    "coatnet": partial(build, "coatnet_nano_rw_224", **COATNET),
    "coat": partial(build, "coat_lite_tiny", **COAT),
}
"""Checked by tests of sites only."""

"""Uncommon models of open_clip: its own attention, pooling by attention, CoCa, other projections, towers of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from veneer.hosts.open_clip import TEXT, VISION

CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}

POOL = {"attn_pooler_queries": 3, "attn_pooler_heads": 2}


def build(cls: str = "CLIP", vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **more: Any) -> nn.Module:
    import open_clip

    config = {"vision_cfg": {**VISION, **(vision or {})}, "text_cfg": {**TEXT, **(text or {})}, **more}
    return getattr(open_clip.model, cls)(embed_dim=16, **config)


def _coca() -> nn.Module:
    import open_clip

    text = {**TEXT, "embed_cls": True, "output_tokens": True, "context_length": 7, "width": 16}
    decoder = {"width": 16, "heads": 2, "layers": 2, "context_length": 7, "vocab_size": 64}
    vision = {**VISION, **POOL, "attentional_pool": True, "output_tokens": True}
    model = open_clip.CoCa(16, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision)
    nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves there what was in the memory
    return model


def _timm(name: str, **vision: Any) -> Callable[[], nn.Module]:
    return lambda: build("CustomTextCLIP", {"timm_model_name": name, "image_size": 160, **vision})


UNCOMMON: dict[str, Callable[[], nn.Module]] = {
    "custom": lambda: build(vision=CUSTOM, text=CUSTOM),
    "pooled": lambda: build(vision={"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}),
    "two_pools": lambda: build(vision={"attentional_pool": "cascade", **POOL, "width": 16, "head_width": 8}),
    "linear_projection": lambda: build(text={"proj_bias": True}),
    "custom_text": lambda: build("CustomTextCLIP", text={"pool_type": "last", "no_causal_mask": True, "proj_bias": True}),
    "timm_mlp": _timm("test_vit", timm_pool="token", timm_proj="mlp"),
    "coca": _coca,
}

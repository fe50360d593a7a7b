"""Image and text models of open_clip: CLIP, CustomTextCLIP and CoCa, both towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from veneer.injection.host import Host, module_names
from veneer.injection.sites import Site

from ._describe import SampleInputs, TowerPart
from ._open_clip_blocks import block
from ._open_clip_towers import text, visual

FAMILIES = {"open_clip.model.CLIP", "open_clip.model.CustomTextCLIP", "open_clip.coca_model.CoCa"}


class OpenClip(Host):
    """Both towers: `vision/…` the image tower, `text/…` the text tower, `decoder/…` CoCa's decoder, `joint/…` the logit scale.

    Attention is packed and read, not called: `attn.{q,k,v}` are rows of `in_proj_weight`, `attn.qkv` is all of it, `attn.out` the
    output layer. A timm trunk has the sites of its host. The projections to the joint space are matrix parameters for
    x @ W instead of linear layers. CLIP's text tower is not a separate module: new tokens are only applied when the
    model itself is called, `model(text=ids)`, not in CLIP's `encode_text`; CustomTextCLIP supports both.
    """

    name: ClassVar[str] = "open_clip"
    tower: ClassVar[str] = "vision"
    library: ClassVar[str] = "open_clip"

    def matches(self, model: nn.Module) -> bool:
        return not FAMILIES.isdisjoint(module_names(model))

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        vision, words, joint = (TowerPart(model, tower, component) for tower in (self.tower, "text", "joint"))
        yield from visual(vision)
        yield from text(words, "text" if vision.module("text") is not None else "")
        yield from _decoder(TowerPart(model, "decoder", component))
        for param, role in {"logit_scale": "logit.scale", "logit_bias": "logit.bias"}.items():
            if joint.has("", param):
                yield joint.parameter("", param, role)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        bare: Any = model
        draw, side = SampleInputs(model), bare.visual.image_size
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        tower = getattr(bare, "text", bare)
        hugging = not hasattr(tower, "token_embedding")
        rows = tower.vocab_size
        ids = draw.ids(3, rows - 1, 2, min(8, tower.context_length) if hugging else tower.context_length)
        # The text is pooled at the largest id, or at the configured end token.
        pool = getattr(tower, "pool_type", None) or getattr(bare, "text_pool_type", None)
        end: Any = getattr(tower, "eos_id", None) or getattr(bare, "text_eos_id", 2)
        ids[:, -1] = end if pool == "eos" else rows - 1
        return {"image": draw.normal(2, 3, height, width), "text": ids}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        resnet = {"layers": [2, 1, 1, 1], "width": 8, "head_width": 32, "patch_size": None, "image_size": 64}
        trunk = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token"}
        return {
            "vit": lambda: _build("CLIP"),
            "vit_quick_gelu": lambda: _build("CLIP", {"ls_init_value": 0.1}, quick_gelu=True, init_logit_bias=-1.0),
            "resnet": lambda: _build("CLIP", resnet),
            "timm": lambda: _build("CustomTextCLIP", trunk),
        }


VISION = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "head_width": 12}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 20, "heads": 2, "layers": 2}


def _build(cls: str, vision: Mapping[str, Any] | None = None, **options: Any) -> nn.Module:
    import open_clip

    config = {**VISION, **(vision or {})}
    model: nn.Module = getattr(open_clip.model, cls)(embed_dim=16, vision_cfg=config, text_cfg=dict(TEXT), **options)
    return model.eval()


def _decoder(part: TowerPart) -> Iterator[Site]:
    """CoCa's caption decoder: each self-attention block is followed by one with cross-attention to the image."""
    decoder = part.module("text_decoder")
    if decoder is None:
        return
    for depth in range(len(decoder.resblocks)):
        here = part.at(depth=depth)
        yield from block(here, f"text_decoder.resblocks.{depth}", decoder.width)
        yield from block(here, f"text_decoder.cross_attn.{depth}", decoder.width, "xattn")
    yield from part.norm("text_decoder.ln_final")
    yield part.parameter("text_decoder", "text_projection", "proj.out")

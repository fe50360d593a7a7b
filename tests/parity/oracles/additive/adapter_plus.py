"""Adapter+, Houlsby's and Pfeiffer's adapters beside the blocks of adapter_plus."""

from __future__ import annotations

from typing import Any

import timm.layers
import timm.models.vision_transformer
from torch import nn

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, HEADS, WIDTH, images, link, perturb_trained, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("visinf/adapter_plus", "191c4ab26fc97ea09ae390383ff79327822853ff", third_party=("houlsby", "pfeiffer"))
METHODS = ("adapter_plus", "houlsby", "pfeiffer")


def rows() -> list[Row]:
    """Blocks of a ViT with the configurations of the authors' paper."""
    compared = "blocks of a ViT: outputs, gradients"
    sites = {"adapter": "mlp.branch"}
    relu = {"act_layer": nn.ReLU}
    pfeiffer = "a block of VPT's code applies drop path after the adapter, veneer before it"
    return [
        Row(
            "adapter_plus",
            compared,
            _difference("adapter_plus", "post", {"adapter": "stream"}, {"bottleneck": 6}, scaling="channel"),
        ),
        Row("houlsby", compared, _difference("houlsby", "houlsby", {**sites, "adapter_attn": "attn.branch"}, {"bottleneck": 6})),
        Row(
            "pfeiffer",
            f"input='sum', {compared}",
            _difference("pfeiffer", "pfeiffer", sites, {"reduction": 4, "input": "sum"}, **relu),
        ),
        Row(
            "pfeiffer",
            f"input='branch', {compared}",
            _difference("pfeiffer", "intermediate", sites, {"reduction": 4}, **relu),
            deviations=pfeiffer,
        ),
    ]


def _difference(
    method: str, form: str, sites: dict[str, str], arguments: dict[str, Any], scaling: Any = 1.0, act_layer: Any = nn.GELU
) -> float:
    model, theirs = vits()
    timm_block = timm.models.vision_transformer.Block
    code = ORACLE.definitions(
        "adapter_plus/vit_adapter.py", "Adapter", "AdapterBlock", Block=timm_block, Mlp=timm.layers.Mlp,
        DropPath=timm.layers.DropPath, Optional=Any, LoRAAttention=None, Any=Any,
        replace={"Optional[torch.Tensor]": "Any", "Optional[float]": "Any"},
    )  # fmt: skip
    for depth in range(DEPTH):
        config = options(
            dim=6, dropout=0.0, drop_path=0.0, act_layer=True, norm_layer=False, bias=True, scaling=scaling, init="houlsby",
            attn_adapter=form == "houlsby", config=form,
        )  # fmt: skip
        block = code.AdapterBlock(WIDTH, HEADS, qkv_bias=True, norm_layer=_norm, adapter_config=config).double()
        block.load_state_dict(theirs.blocks[depth].state_dict(), strict=False)
        if act_layer is nn.ReLU:
            block.adapter.bottleneck[2] = nn.ReLU()
        block.requires_grad_(False)
        for name in sites:
            block.get_submodule(name).requires_grad_(True)
        theirs.blocks[depth] = block
    perturb_trained(theirs)
    tuned = attach(model, method, **arguments)
    links: Any = []
    for depth in range(DEPTH):
        for name, site in sites.items():
            adapter, ours = theirs.blocks[depth].get_submodule(name), tuned.parts[f"blocks.{depth}.{site}"][1]
            links += [(tensor, link(parameter)) for tensor, parameter in _tensors(ours, adapter)]
    theirs.eval()
    return measure(lambda: model(images()), lambda: theirs(images()), links)


def _tensors(ours: Any, adapter: Any) -> list[Any]:
    down, up = adapter.bottleneck[1], adapter.bottleneck[4]
    pairs = [(ours.down, down.weight), (ours.down_bias, down.bias), (ours.up, up.weight), (ours.up_bias, up.bias)]
    return [*pairs, (ours.channel_scale, adapter.scaling)] if hasattr(ours, "channel_scale") else pairs


def _norm(width: int, **_: Any) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)

"""AdaptFormer beside its authors' blocks."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from torch import nn

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, HEADS, WIDTH, images, links, perturb_trained, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("ShoufaChen/AdaptFormer", "6967d676c1a5e5a11be2e2768a6e5c604bb043ed")
METHODS = ("adaptformer",)
NAMES = {"down": "down_proj.weight", "down_bias": "down_proj.bias", "up": "up_proj.weight", "up_bias": "up_proj.bias"}


def rows() -> list[Row]:
    """The parallel form in every block of a ViT, without dropout."""
    model, theirs = vits()
    adapter = ORACLE.definitions("models/adapter.py", "Adapter").Adapter
    code = ORACLE.definitions("models/custom_modules.py", "Attention", "Block", DropPath=timm.layers.DropPath, Adapter=adapter)
    config = options(
        ffn_adapt=True, ffn_option="parallel", ffn_adapter_layernorm_option="none", ffn_adapter_init_option="lora",
        ffn_adapter_scalar="0.3", ffn_num=6, d_model=WIDTH,
    )  # fmt: skip
    for depth in range(DEPTH):
        norm = lambda width: nn.LayerNorm(width, eps=1e-6)  # noqa: E731
        block = code.Block(WIDTH, HEADS, qkv_bias=True, norm_layer=norm, config=config).double().requires_grad_(False)
        _copy(block, theirs.blocks[depth])
        block.adaptmlp.requires_grad_(True)
        theirs.blocks[depth] = block
    perturb_trained(theirs)
    tuned = attach(model, "adaptformer", bottleneck=6, scale=0.3, dropout=0.0)
    theirs.eval()
    pairs: Any = []
    for depth, block in enumerate(theirs.blocks):
        pairs += links(tuned.parts[f"blocks.{depth}.mlp.branch"][1], block.adaptmlp, **NAMES)
    difference = measure(lambda: model(images()), lambda: theirs(images()), pairs)
    return [Row("adaptformer", "blocks of a ViT: outputs, gradients", difference)]


def _copy(block: Any, source: Any) -> None:
    with torch.no_grad():
        weights, biases = source.attn.qkv.weight.chunk(3), source.attn.qkv.bias.chunk(3)
        for linear, weight, bias in zip((block.attn.q_proj, block.attn.k_proj, block.attn.v_proj), weights, biases, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    for ours, theirs in ((block.attn.proj, source.attn.proj), (block.fc1, source.mlp.fc1), (block.fc2, source.mlp.fc2)):
        ours.load_state_dict(theirs.state_dict())
    block.norm1.load_state_dict(source.norm1.state_dict())
    block.norm2.load_state_dict(source.norm2.state_dict())

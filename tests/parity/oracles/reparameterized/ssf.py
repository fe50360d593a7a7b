"""SSF beside its authors' blocks."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from torch import nn

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, HEADS, WIDTH, images, link, offset_link, perturb_trained, vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("dongzelian/SSF", "e94e0e704a4ece1986a537c97a95158b46838f71")
METHODS = ("ssf",)
SITES = {
    "norm1": "ssf_{}_1", "norm2": "ssf_{}_2", "attn.qkv": "attn.ssf_{}_1", "attn.proj": "attn.ssf_{}_2",
    "mlp.fc1": "mlp.ssf_{}_1", "mlp.fc2": "mlp.ssf_{}_2",
}  # fmt: skip


def rows() -> list[Row]:
    """Blocks of a ViT."""
    model, theirs = vits()
    code = ORACLE.definitions(
        "models/vision_transformer.py", "Mlp", "Attention", "LayerScale", "Block", "init_ssf_scale_shift", "ssf_ada",
        to_2tuple=timm.layers.to_2tuple, DropPath=timm.layers.DropPath,
    )  # fmt: skip
    for depth in range(DEPTH):
        norm = lambda width: nn.LayerNorm(width, eps=1e-6)  # noqa: E731
        block = code.Block(WIDTH, HEADS, qkv_bias=True, norm_layer=norm, tuning_mode="ssf").double()
        block.load_state_dict(theirs.blocks[depth].state_dict(), strict=False)
        for name, p in block.named_parameters():
            p.requires_grad_("ssf" in name)
        theirs.blocks[depth] = block
    perturb_trained(theirs)
    tuned = attach(model, "ssf")
    with torch.no_grad():
        for p in tuned.parameters():
            p.zero_()
    pairs: Any = []
    for depth, block in enumerate(theirs.blocks):
        for site, name in SITES.items():
            ours: Any = tuned.parts[f"blocks.{depth}.{site}"][1]
            pairs.append((ours.shift, link(block.get_parameter(name.format("shift")))))
            pairs.append((ours.gain, offset_link(block.get_parameter(name.format("scale")), 1)))
    difference = measure(lambda: model(images()), lambda: theirs(images()), pairs)
    text = "on Swin and ConvNeXt the authors scale no downsampling layer; veneer scales its norm and reduction"
    return [Row("ssf", "blocks of a ViT: outputs, gradients", difference, deviations=text)]

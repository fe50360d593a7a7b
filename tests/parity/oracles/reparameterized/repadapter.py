"""RepAdapter beside its authors' layers in a timm ViT."""

from __future__ import annotations

from types import MethodType
from typing import Any

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, WIDTH, images, perturb_trained, vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("luogen1996/RepAdapter", "360992fc2a36f069fd168754f14bc1986d869a8f")
METHODS = ("repadapter",)
PLACES = {"attn.qkv": "adapter_attn", "mlp.fc1": "adapter_mlp"}


def rows() -> list[Row]:
    """Before the attention and the MLP of every block."""
    model, theirs = vits()
    code = ORACLE.definitions("repadapter.py", "RepAdapter", "forward_vit_block_adapter")
    for block in theirs.blocks:
        block.adapter_attn, block.adapter_mlp = (code.RepAdapter(WIDTH, 8, 2, 0.7) for _ in range(2))
        block.forward = MethodType(code.forward_vit_block_adapter, block)
    perturb_trained(theirs)
    theirs.eval()
    tuned = attach(model, "repadapter", scale=0.7)
    pairs: Any = []
    for depth in range(DEPTH):
        for site, place in PLACES.items():
            pairs += _pairs(tuned.parts[f"blocks.{depth}.{site}"][1], theirs.blocks[depth].get_submodule(place))
    difference = measure(lambda: model(images()), lambda: theirs(images()), pairs)
    return [Row("repadapter", "blocks of a ViT: outputs, gradients", difference)]


def _pairs(ours: Any, theirs: Any) -> Any:
    down, up = theirs.conv_A, theirs.conv_B
    return [
        (ours.down, lambda read: read(down.weight).squeeze(-1)), (ours.down_bias, lambda read: read(down.bias)),
        (ours.up, lambda read: read(up.weight).squeeze(-1)), (ours.up_bias, lambda read: read(up.bias)),
    ]  # fmt: skip

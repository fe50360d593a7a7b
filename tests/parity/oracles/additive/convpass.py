"""Convpass beside its authors' blocks of a timm ViT."""

from __future__ import annotations

from typing import Any

import timm

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, GRID, WIDTH, images, links, perturb_trained, vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("JieShibo/PETL-ViT", "026e4f12cfbe1e46bfb4d3ed5ba09f2d9f83e91e")
METHODS = ("convpass",)
NAMES = {
    "down": "adapter_down.weight", "down_bias": "adapter_down.bias", "up": "adapter_up.weight", "up_bias": "adapter_up.bias",
    "conv": "adapter_conv.weight", "conv_bias": "adapter_conv.bias",
}  # fmt: skip


def rows() -> list[Row]:
    """Both branches of every block."""
    model, theirs = vits()
    code = ORACLE.definitions(
        "convpass/vtab/convpass.py", "forward_block", "QuickGELU", "Convpass", "set_Convpass", timm=timm,
        replace={
            "14": str(GRID), "nn.Linear(768, dim)": f"nn.Linear({WIDTH}, dim)", "nn.Linear(dim, 768)": f"nn.Linear(dim, {WIDTH})",
        },
    )  # fmt: skip
    code.set_Convpass(theirs, "convpass", 8, 0.7)
    perturb_trained(theirs)
    theirs.eval()
    tuned = attach(model, "convpass", scale=0.7)
    pairs: Any = []
    for depth in range(DEPTH):
        for branch in ("attn", "mlp"):
            adapter = tuned.parts[f"blocks.{depth}.{branch}.branch"][1]
            pairs += links(adapter, theirs.blocks[depth].get_submodule(f"adapter_{branch}"), **NAMES)
    difference = measure(lambda: model(images()), lambda: theirs(images()), pairs)
    return [Row("convpass", "both branches of a ViT: outputs, gradients", difference)]

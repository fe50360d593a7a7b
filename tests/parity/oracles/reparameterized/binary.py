"""Bi-LoRA and Bi-AdaptFormer beside their authors' quantized layers in a timm ViT."""

from __future__ import annotations

from typing import Any

import scipy.stats
import timm

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, WIDTH, images, links, perturb_trained, vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("JieShibo/PETL-ViT", "026e4f12cfbe1e46bfb4d3ed5ba09f2d9f83e91e")
METHODS = ("bi_adaptformer", "bi_lora")


def rows() -> list[Row]:
    """One bit, with the authors' levels in float64."""
    compared = "quantized in a ViT: outputs, gradients"
    lora = {f"attn.{x}": (f"attn.lora_{x}", f"attn.{x}") for x in "qv"}
    mlp = {"": ("adapter_mlp", "mlp.branch")}
    text = "the two levels are rounded to float32"
    return [
        Row("bi_lora", compared, _difference("bi_lora", "lora.py", lora, {"rank": 6}), deviations=text),
        Row("bi_adaptformer", compared, _difference("bi_adaptformer", "adaptformer.py", mlp, {"bottleneck": 6}), deviations=text),
    ]


def _difference(method: str, path: str, places: dict[str, tuple[str, str]], options: dict[str, int]) -> float:
    model, theirs = vits()
    layer = ORACLE.definitions("binary_adapter/utils.py", "QLinear", norm=scipy.stats.norm, replace={".float()": ".double()"})
    sizes = {"768, dim": f"{WIDTH}, dim", "dim, 768": f"dim, {WIDTH}"}
    code = ORACLE.definitions(f"binary_adapter/{path}", QLinear=layer.QLinear, timm=timm, replace=sizes)
    code.set_adapter(theirs, 6, 0.7)
    perturb_trained(theirs)
    theirs.eval()
    tuned = attach(model, method, scale=0.7, **options)
    pairs: Any = []
    for depth in range(DEPTH):
        for place, ours in places.values():
            adapter = tuned.parts[f"blocks.{depth}.{ours}"][1]
            pairs += links(adapter, theirs.blocks[depth].get_submodule(place), down="adapter_down.weight", up="adapter_up.weight")
    return measure(lambda: model(images()), lambda: theirs(images()), pairs)

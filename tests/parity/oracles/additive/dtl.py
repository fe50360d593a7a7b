"""DTL and DTL+ beside their authors' forward pass of a ViT."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from tests.parity.measure import Row, measure
from tests.parity.models import GRID, WIDTH, images, link, links, perturb_trained, vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("heekhero/DTL", "bf6c51e679d7d2244f4c8337cb68a85b54e7c37a")
METHODS = ("dtl",)


def rows() -> list[Row]:
    """Three blocks of a ViT with mean pooling, of which the last two are written to."""
    text = "the authors pool the patches by mean; on a model with a class token veneer keeps its pooling"
    return [
        Row("dtl", "DTL, a ViT: outputs, gradients", _difference(0), deviations=text),
        Row("dtl", "DTL+, a ViT: outputs, gradients", _difference(3), deviations=text),
    ]


def _difference(conv: int) -> float:
    model, theirs = vits(depth=3, global_pool="avg")
    code = ORACLE.definitions(
        "models/vision_transformer.py", "swish", "LoRALinear", "VisionTransformer", PatchEmbed=None,
        replace={"14, 14": f"{GRID}, {GRID}", "196": str(GRID**2)},
    )  # fmt: skip
    theirs.norm, theirs.dist_token, theirs.num_tokens, theirs.beta = theirs.fc_norm, None, 1, 1.5
    theirs.lora_before_blocks, theirs.add_after_blocks = ["0", "1", "2"], ["1", "2"]
    theirs.lora_dict = nn.ModuleDict({str(i): code.LoRALinear(WIDTH, WIDTH, r=3) for i in range(3)})
    theirs.lora_fusion = nn.Conv2d(WIDTH, WIDTH, conv, padding="same", groups=WIDTH, bias=False) if conv else None
    theirs.forward = MethodType(code.VisionTransformer.forward, theirs)
    perturb_trained(theirs)
    tuned = attach(model, "dtl", rank=3, beta=1.5, write_from=1, conv=conv)
    pairs: Any = []
    for i, (_, ours) in enumerate(tuned.parts.values()):
        pairs += links(ours, theirs.lora_dict[str(i)], A="lora_A", B="lora_B")
    if conv:
        adapter: Any = ours
        pairs.append((next(iter(adapter.shared.convs.values())), link(theirs.lora_fusion.weight)))
    return measure(lambda: model(images()), lambda: theirs(images()), pairs)

"""LST's gates beside its authors' merge of a backbone's features into a side network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import DEPTH, images, link, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("ylsung/Ladder-Side-Tuning", "1798e82e52f2f071084e6a10126c3da359176238")
METHODS = ("lst",)
TEMPERATURE = 0.4


def rows() -> list[Row]:
    """A ladder over the blocks of a ViT, with our side blocks on both sides and the authors' gates on theirs."""
    code = ORACLE.definitions("CLIP-ViL/src/lxrt/modeling.py", "LXRTEncoder", VISUAL_CONFIG=options())
    merge = code.LXRTEncoder.merge_backbone_to_side
    model, bare = vits()
    tuned = attach(model, "lst", reduction=2, temperature=TEMPERATURE)
    parts: Any = [adapter for _, adapter in tuned.parts.values()]
    perturb(nn.ModuleList(parts), 0.2)
    gates = [nn.Parameter(adapter.alpha.detach().clone()) for adapter in parts]
    theirs = options(use_gate="learnable", gate_T=TEMPERATURE, side_gate_params_v=gates)
    ends = next(iter(parts[0].shared.ends.values()))

    def forward() -> Tensor:
        x = bare._pos_embed(bare.patch_embed(images()))
        side = ends.down(x)
        for index in range(DEPTH):
            x = bare.blocks[index](x)
            side = parts[index].block(merge(theirs, side, parts[index].down(x), "v", index))
        out: Tensor = bare.forward_head(bare.norm(ends.up(ends.norm(side))))
        return out

    pairs = [(adapter.alpha, link(gate)) for adapter, gate in zip(parts, gates, strict=True)]
    difference = measure(lambda: model(images()), forward, pairs)
    text = "the authors have side layers of T5 and BERT, here they are blocks of a ViT on both sides"
    return [Row("lst", "gates of a ladder on a ViT: outputs, gradients", difference, deviations=text)]

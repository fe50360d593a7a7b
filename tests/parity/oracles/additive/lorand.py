"""LoRand beside its authors' adapter, which they published with a later method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.methods.bottlenecks import branch
from tests.parity.measure import Row, measure, randn
from tests.parity.models import link, perturb_trained
from tests.parity.oracle import Repository
from veneer.methods.additive.bottleneck.lorand import LoRand

ORACLE = Repository("DongshuoYin/CoLin", "332da5c256e28ef1600c7e83c7442495f760ea8f")
METHODS = ("lorand",)
FACTORS = {"in": "A", "kernel": "g", "out": "B"}


def rows() -> list[Row]:
    """One adapter with four branches of rank 8 and separate kernels."""
    namespace = {"BaseModule": nn.Module, "Parameter": nn.Parameter, "init": nn.init}
    code = ORACLE.definitions("MMDetection/mmdet/models/backbones/swin_lorand.py", "Lorand_Multi", "Lorand", **namespace)
    theirs = code.Lorand(16, factor=2)
    perturb_trained(theirs)
    ours: Any = LoRand(branches=4, rank=8, reduction=2, share_kernel=False).build(branch(width=16)).double()
    pairs: Any = []
    for side, layer in (("down", theirs.project1), ("up", theirs.project2)):
        names = {"in": f"{side}_in", "kernel": "kernel" if side == "down" else "up_kernel", "out": f"{side}_out"}
        pairs += [(getattr(ours, names[part]), _stacked(layer.param_dict, letter)) for part, letter in FACTORS.items()]
        pairs.append((getattr(ours, f"{side}_bias"), link(layer.bias)))
    y = randn(2, 7, 16)
    difference = measure(lambda: ours.output(y, y), lambda: theirs(y), pairs)
    text = "the paper shares the kernels of both matrices, which is the default"
    return [Row("lorand", "one adapter: outputs, gradients", difference, deviations=text)]


def _stacked(factors: Any, letter: str) -> Any:
    return lambda read: torch.stack([read(factors[f"{letter}{i}"]) for i in range(4)])

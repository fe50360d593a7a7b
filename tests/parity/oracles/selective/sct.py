"""SCT beside its authors' adapter on selected channels."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_

from tests.methods.bottlenecks import branch
from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import links
from tests.parity.oracle import Repository
from veneer.methods.selective.structures.sct import SCT

ORACLE = Repository("showlab/SCT", "384cecb572c907022a35d2afd19a659412c12c0f")
METHODS = ("sct",)
CHANNELS = [1, 4, 5, 9, 14]


def rows() -> list[Row]:
    """One adapter on given channels of the stream after an attention."""
    code = ORACLE.definitions("models/vision_transformer_sct.py", "ChannelAdapter", trunc_normal_=trunc_normal_)
    theirs = code.ChannelAdapter(5, torch.tensor(CHANNELS), 1.0, False).double()
    perturb(theirs)
    ours = SCT(channels=5).build(branch(width=16)).double()
    ours.index.copy_(torch.tensor(CHANNELS))
    x, y = randn(2, 7, 16), randn(2, 7, 16, seed=2)
    pairs = links(ours, theirs, weight_s="adapt_linear.weight", bias_s="adapt_linear.bias")
    difference = measure(lambda: x + ours.output(x, y), lambda: theirs((x + y).clone()), pairs)
    return [Row("sct", "one adapter: outputs, gradients", difference)]

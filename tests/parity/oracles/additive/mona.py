"""Mona beside its authors' adapter."""

from __future__ import annotations

from torch import nn

from tests.methods.bottlenecks import branch
from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import links
from tests.parity.oracle import Repository
from veneer.methods.additive.bottleneck.mona import Mona

ORACLE = Repository("Leiyi-Hu/mona", "5deeac9f4fc5e788b7fa0132ec568cd256afca12")
METHODS = ("mona",)
PATH = "Swin-Transformer-Classification/mmcls/models/backbones/swin_transformer_mona.py"
NAMES = {
    "down": "project1.weight", "down_bias": "project1.bias", "up": "project2.weight", "up_bias": "project2.bias",
    "norm_weight": "norm.weight", "norm_bias": "norm.bias", "norm_scale": "gamma", "stream_scale": "gammax",
    "conv3": "adapter_conv.conv1.weight", "conv3_bias": "adapter_conv.conv1.bias", "conv5": "adapter_conv.conv2.weight",
    "conv5_bias": "adapter_conv.conv2.bias", "conv7": "adapter_conv.conv3.weight", "conv7_bias": "adapter_conv.conv3.bias",
    "pointwise": "adapter_conv.projector.weight", "pointwise_bias": "adapter_conv.projector.bias",
}  # fmt: skip


def rows() -> list[Row]:
    """One adapter on a grid of patches, whose input is the sum of a stream and its branch."""
    code = ORACLE.definitions(PATH, "MonaOp", "Mona", BaseModule=nn.Module, replace={"64": "6"})
    theirs = code.Mona(16).double().eval()
    perturb(theirs)
    ours = Mona(bottleneck=6).build(branch(width=16, prefix=0, grid=(4, 3))).double().eval()
    x, y = randn(2, 12, 16), randn(2, 12, 16, seed=2)
    difference = measure(lambda: ours.output(x, y) - y, lambda: theirs(x + y, (4, 3)) - (x + y), links(ours, theirs, **NAMES))
    return [Row("mona", "one adapter: outputs, gradients", difference)]

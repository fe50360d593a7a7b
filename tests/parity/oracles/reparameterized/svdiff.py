"""SVDiff beside the layers of a public reimplementation."""

from __future__ import annotations

from einops import rearrange
from torch import nn

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import WIDTH, layer, link, tokens
from tests.parity.oracle import Repository

ORACLE = Repository("mkshing/svdiff-pytorch", "a78f69e14410c1963318806050a566d262eca9f8", third_party=("svdiff",))
METHODS = ("svdiff",)


def rows() -> list[Row]:
    """The first linear layer of an MLP."""
    ours, linear = layer("svdiff", "mlp.fc1")
    code = ORACLE.definitions("svdiff_pytorch/layers.py", "SVDLinear", rearrange=rearrange)
    theirs = code.SVDLinear(WIDTH, 4 * WIDTH).double()
    theirs.load_state_dict(linear.state_dict(), strict=False)
    perturb(nn.ParameterList([theirs.delta]))
    x = tokens()
    difference = measure(lambda: ours.output(x, linear(x)), lambda: theirs(x), [(ours.delta, link(theirs.delta))])
    return [Row("svdiff", "a linear layer: outputs, gradients", difference)]

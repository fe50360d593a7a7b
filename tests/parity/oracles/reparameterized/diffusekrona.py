"""DiffuseKronA beside its authors' layer."""

from __future__ import annotations

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import WIDTH, layer, link, tokens
from tests.parity.oracle import Repository

ORACLE = Repository("IBM/DiffuseKronA", "6c24fc5ce3811d72b7f731e2b18c6a6fef3ade3b")
METHODS = ("diffusekrona",)


def rows() -> list[Row]:
    """The first linear layer of an MLP."""
    ours, linear = layer("diffusekrona", "mlp.fc1", where="mlp.in", a1=8, a2=4)
    code = ORACLE.definitions("diffusekrona/krona.py", "kronecker", "KronALinearLayer")
    theirs = code.KronALinearLayer(WIDTH, 4 * WIDTH, rank=(8, 4)).double()
    perturb(theirs)
    x = tokens()
    pairs = [(ours.left, lambda read: read(theirs.down.weight).T), (ours.right, link(theirs.up.weight))]
    difference = measure(lambda: ours.output(x, linear(x)) - linear(x), lambda: theirs(x), pairs)
    return [Row("diffusekrona", "a linear layer: outputs, gradients", difference)]

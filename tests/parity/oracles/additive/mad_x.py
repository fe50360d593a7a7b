"""MAD-X's invertible adapter of embeddings beside the coupling of AdapterHub."""

from __future__ import annotations

from typing import Any

from transformers.activations import get_activation

from tests.parity.measure import Row, measure, randn
from tests.parity.models import link, perturb_trained
from tests.parity.oracle import Repository
from veneer.methods.additive.stacked.mad_x import Coupling

ORACLE = Repository("adapter-hub/adapters", "88f18ebd6c127f0e0ddf7c76cb84b37a39b82c12")
METHODS = ("mad_x",)


def rows() -> list[Row]:
    """The coupling of an odd width; the adapter after the MLP is `pfeiffer`'s."""
    names = ("get_subnet_constructor", "NICECouplingBlock")
    activation = ORACLE.definitions(
        "src/adapters/methods/modeling.py", "Activation_Function_Class", get_activation=get_activation
    )
    namespace = {"Activation_Function_Class": activation.Activation_Function_Class}
    code = ORACLE.definitions("src/adapters/methods/modeling.py", *names, **namespace)
    theirs = code.NICECouplingBlock([[13]], reduction_factor=2)
    perturb_trained(theirs)
    ours = Coupling(13, 2).double()
    pairs: Any = []
    for name, net in (("f", theirs.F), ("g", theirs.G)):
        for part, linear in (("down", net[0]), ("up", net[2])):
            pairs += [(ours.get_parameter(f"{name}_{part}"), link(linear.weight))]
            pairs += [(ours.get_parameter(f"{name}_{part}_bias"), link(linear.bias))]
    x = randn(2, 7, 13)
    return [Row("mad_x", "coupling of the embeddings: outputs, gradients", measure(lambda: ours(x), lambda: theirs(x), pairs))]

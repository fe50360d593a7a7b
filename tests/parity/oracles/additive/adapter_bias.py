"""AdapterBias beside its authors' BERT layer."""

from __future__ import annotations

from typing import Any

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import WIDTH, layer, links, tokens
from tests.parity.oracle import Repository, options

ORACLE = Repository("Allen0307/AdapterBias", "fd9929ff1e72c4fcafb318345c94938ac2dec030")
METHODS = ("adapter_bias",)


def rows() -> list[Row]:
    """The second linear layer of an MLP, before and after the layer's norm."""
    ours, linear = layer("adapter_bias", "mlp.fc2")
    settings = options(adapter=True, share_alpha=0)
    code = ORACLE.definitions(
        "src/transformers/models/bert/modeling_bert.py", "BertOutput", args=settings, print=lambda text: None
    )
    shape = {"intermediate_size": 4 * WIDTH, "hidden_size": WIDTH, "layer_norm_eps": 1e-6, "hidden_dropout_prob": 0.0}
    theirs = code.BertOutput(options(**shape)).double()
    perturb(theirs)
    theirs.dense.load_state_dict(linear.state_dict())
    x, residual = tokens(4 * WIDTH), tokens()
    pairs: Any = [*links(ours, theirs, vector="adapter_vector")]
    pairs += links(ours.token_weight, theirs.adapter_alpha, weight="weight", bias="bias")
    difference = measure(lambda: theirs.LayerNorm(ours.output(x, linear(x)) + residual), lambda: theirs(x, residual), pairs)
    return [Row("adapter_bias", "a linear layer: outputs, gradients", difference)]

"""MLAE beside its authors' layer."""

from __future__ import annotations

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import WIDTH, layer, links, tokens
from tests.parity.oracle import Repository

ORACLE = Repository("jie040109/MLAE", "7452aa4ab275c8c82b84d3aefd6ccb7a4274efb7")
METHODS = ("mlae",)


def rows() -> list[Row]:
    """The output projection of an attention, without masks."""
    ours, linear = layer("mlae", "attn.proj", rank=5)
    code = ORACLE.definitions("mlae.py", "LoRALayer", "MLAE_Linear")
    theirs = code.MLAE_Linear(WIDTH, WIDTH, r=5, lora_alpha=1.0, drop_rate=0.0, merge_weights=False).double()
    perturb(theirs)
    theirs.load_state_dict(linear.state_dict(), strict=False)
    pairs = links(ours, theirs, down="lora_A", values="lora_lamda")
    pairs.append((ours.up, lambda read: read(theirs.lora_B).T))
    x = tokens()
    return [
        Row("mlae", "a linear layer: outputs, gradients", measure(lambda: ours.output(x, linear(x)), lambda: theirs(x), pairs))
    ]

"""GLoRA beside its authors' super-network layer with every path fixed."""

from __future__ import annotations

from typing import Any

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import WIDTH, tokens, vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("Arnav0400/ViT-Slim", "0fed674833f70f98b19678963ae37c070c987215")
METHODS = ("glora",)


def rows() -> list[Row]:
    """The output projection of an attention; C is the zero path."""
    model, bare = vits()
    parts = attach(model, "glora", rank=3).parts
    weight: Any = parts["blocks.0.attn.proj"][1]
    bias: Any = parts["blocks.0.attn.proj.bias"][1]
    linear = bare.blocks[0].attn.proj
    code = ORACLE.definitions("GLoRA/layer.py", "SuperScalableLinear", replace={".cuda()": ".double()"})
    theirs = code.SuperScalableLinear(WIDTH, WIDTH, 3).double()
    perturb(theirs)
    theirs.load_state_dict(linear.state_dict(), strict=False)
    theirs.eval_config = {"A": "LoRA_3", "B": "LoRA_3", "C": "none", "D": "vector", "E": "vector"}
    pairs: Any = [
        (weight.scale.up, lambda read: read(theirs.Ad)), (weight.scale.down, lambda read: read(theirs.Au)),
        (weight.shift.up, lambda read: read(theirs.Bd)), (weight.shift.down, lambda read: read(theirs.Bu)),
        (bias.scale.up, lambda read: read(theirs.D)[:, None]), (bias.shift.up, lambda read: read(theirs.E)[:, None]),
    ]  # fmt: skip
    x = tokens()
    difference = measure(
        lambda: x @ weight.weight(linear.weight.detach()).T + bias.weight(linear.bias.detach()), lambda: theirs(x), pairs
    )
    text = "the authors search over paths and have a prompt term C; here the paths are options and there is no C"
    return [Row("glora", "a linear layer: outputs, gradients", difference, deviations=text)]

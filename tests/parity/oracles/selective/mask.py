"""Masking beside its authors' linear layer."""

from __future__ import annotations

import warnings

import torch
from torch.nn import functional as F

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import layer, link, tokens
from tests.parity.oracle import Repository

ORACLE = Repository("ptlmasking/maskbert", "8d6d8df807b6b019c86a8aaf5dc3e164573f25dd")
METHODS = ("mask",)
THRESHOLD = 0.01
NAMES = (
    "MaskedLinearX", "MaskedLinear1", "_Binarizer1", "_Binarizer2", "_Binarizer3", "binarizer_fn1", "_scheme_idx_to_fn",
    "reshape_mask_for_sp",
)  # fmt: skip


def rows() -> list[Row]:
    """A linear layer whose scores lie on both sides of the threshold."""
    code = ORACLE.definitions("code/masking/maskers.py", *NAMES, warnings=warnings)
    ours, linear = layer("mask", "mlp.fc1", where="mlp.in", threshold=THRESHOLD)
    structure = {"structured_masking": None, "structured_masking_types": None, "force_masking": "all"}
    theirs = code.MaskedLinear1(
        linear.weight,
        linear.bias,
        False,
        name="all",
        threshold=torch.tensor(THRESHOLD, dtype=torch.float64),
        init_scale=0.02,
        init_sparsity=0.5,
        controlled_init=None,
        structured_masking_info=structure,
    )
    perturb(torch.nn.ParameterList([theirs.weight_mask]))
    zeros = (theirs.weight_mask <= THRESHOLD).double().mean()
    assert 0.2 < zeros < 0.8
    x = tokens().requires_grad_()
    y = tokens().requires_grad_()
    pairs = [(ours.scores, link(theirs.weight_mask)), (x, link(y))]
    difference = measure(lambda: F.linear(x, ours.weight(linear.weight), linear.bias), lambda: theirs(y), pairs)
    text = "the initial scores, (−0.02, 0.03 / sparsity − 0.02) in the code, lie in an interval of width 2 · threshold here"
    return [Row("mask", "a linear layer: outputs, gradients", difference, deviations=text)]

"""CoDA's differentiable top-k beside a public implementation of coordinate descent."""

from __future__ import annotations

from typing import Any

import torch

from tests.parity.measure import Row, measure, randn
from tests.parity.models import link
from tests.parity.oracle import Repository
from veneer.methods.additive.experts.coda import soft_top_k

ORACLE = Repository("lucidrains/CoLT5-attention", "f2a8da09644615e827fc49883d2652c5c1c22792", third_party=("coda",))
METHODS = ("coda",)


def rows() -> list[Row]:
    """Weights of tokens and their gradients; there is no public code of the rest."""
    names = ("exists", "default", "log", "coor_descent")
    code = ORACLE.definitions("colt5_attention/coor_descent.py", *names, autocast=_autocast)
    worst = 0.0
    for k, epsilon in ((3, 1.0), (7, 0.3), (12, 0.1), (5, 0.02)):
        ours, theirs = (torch.nn.Parameter(randn(4, 16, seed=k)) for _ in range(2))
        reference = lambda s=theirs, k=k, e=epsilon: code.coor_descent(s, n_iters=20, k=k, eps=e, eps_init=4, eps_decay=0.7)  # noqa: E731
        mine = lambda s=ours, k=k, e=epsilon: soft_top_k(s, k, e)  # noqa: E731
        worst = max(worst, measure(mine, reference, [(ours, link(theirs))]))
    return [Row("coda", "soft top-k: weights, gradients", worst)]


def _autocast(*_: object, **__: object) -> Any:
    """A decorator with options that leaves a function as it is."""
    return lambda function: function

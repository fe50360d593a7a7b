"""AdaMix beside the mixture of its authors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional as F

from tests.methods.bottlenecks import branch
from tests.parity.measure import Row, measure, randn
from tests.parity.models import perturb_trained
from tests.parity.oracle import Repository
from veneer.methods.additive.experts.adamix import AdaMix

ORACLE = Repository("microsoft/AdaMix", "d361e9d6a24cb44d6d6169337128a0cf6feb6e1d")
METHODS = ("adamix",)


def rows() -> list[Row]:
    """All experts averaged, and random routes, with either projection shared."""
    forms = [(down, up, seed) for down, up in ((0, 1), (1, 0), (0, 0)) for seed in (None, 1, 2)]
    return [Row("adamix", "one adapter, routes and averages: outputs, gradients", max(_difference(*form) for form in forms))]


def _difference(share_down: int, share_up: int, seed: int | None) -> float:
    code = ORACLE.definitions(
        "src/transformers/models/expert_soup.py", "MixtureSoup", "ExpertSoup", copy=copy, get_activation=lambda name: F.gelu,
    )  # fmt: skip
    theirs = code.ExpertSoup(16, 5, "gelu", num_expert=4, inference_level=3, sharing_down=share_down, sharing_up=share_up)
    perturb_trained(theirs)
    ours: Any = (
        AdaMix(bottleneck=5, experts=4, share_down=bool(share_down), share_up=bool(share_up)).build(branch(width=16)).double()
    )
    for side in (ours, theirs):
        side.train(seed is not None)
    pairs: Any = []
    for name, mixture in (("down", theirs.MoA_A), ("up", theirs.MoA_B)):
        experts = mixture.deepspeed_experts
        pairs += [(getattr(ours, name), _stacked(experts, "weight")), (getattr(ours, f"{name}_bias"), _stacked(experts, "bias"))]
    if seed is not None:
        torch.manual_seed(seed)
        ours.route = torch.tensor([int(torch.randint(0, m.num_local_experts, (1,))) for m in (theirs.MoA_A, theirs.MoA_B)])
        torch.manual_seed(seed)
    x = randn(2, 7, 16)
    return measure(lambda: ours.output(x, x), lambda: theirs(x, x), pairs)


def _stacked(experts: Any, name: str) -> Any:
    return lambda read: torch.stack([read(getattr(expert, name)) for expert in experts])

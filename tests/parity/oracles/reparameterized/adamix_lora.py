"""AdaMix with LoRA beside its authors' layer of GPT-2."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.parity.measure import Row, measure, randn
from tests.parity.models import link, perturb_trained
from tests.parity.oracle import Repository
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank.adamix_lora import AdaMixLoRA

ORACLE = Repository("microsoft/AdaMix", "d361e9d6a24cb44d6d6169337128a0cf6feb6e1d")
METHODS = ("adamix_lora",)
WIDTH, HEIGHT, RANK, EXPERTS = 12, 10, 3, 4
TEXT = "in the code q and v have one sample, in a fused layer, and the consistency loss a factor of 100"


def rows() -> list[Row]:
    """All experts averaged, and random routes, with either matrix shared."""
    forms = [(down, up, seed) for down, up in ((0, 1), (1, 0), (0, 0)) for seed in (None, 1, 2)]
    difference = max(_difference(*form) for form in forms)
    return [Row("adamix_lora", "a linear layer, routes and averages: outputs, gradients", difference, deviations=TEXT)]


def _difference(share_down: int, share_up: int, seed: int | None) -> float:
    names = ("LoRALayer", "MergedLinear", "AdamixMergedLinear")
    code = ORACLE.definitions("NLG/loralib/layers.py", *names, copy=copy, List=list, Optional=None)
    theirs = code.AdamixMergedLinear(
        EXPERTS, share_down, share_up, in_features=WIDTH, out_features=HEIGHT, r=RANK, lora_alpha=6, enable_lora=[True],
        merge_weights=False,
    )  # fmt: skip
    theirs.bias.requires_grad_(False)
    perturb_trained(theirs)
    site = WeightSite(name="l", role="attn.q", path="l", d_out=HEIGHT, d_in=WIDTH)
    method = AdaMixLoRA(rank=RANK, alpha=6.0, experts=EXPERTS, share_down=bool(share_down), share_up=bool(share_up))
    ours: Any = method.build(site).double()
    for side in (ours, theirs):
        side.train(seed is not None)
    if seed is not None:
        ours.route = _sample(seed, share_down, share_up)
        torch.manual_seed(seed)
    x, y = randn(2, 7, WIDTH).requires_grad_(), randn(2, 7, WIDTH).requires_grad_()
    pairs: Any = [
        (ours.down, lambda read: torch.stack([read(p) for p in theirs.experts_lora_A])),
        (ours.up, lambda read: torch.stack([read(p) for p in theirs.experts_lora_B])),
        (x, link(y)),
    ]
    linear = torch.nn.functional.linear
    return measure(lambda: ours.output(x, linear(x, theirs.weight, theirs.bias)), lambda: theirs(y), pairs)


def _sample(seed: int, share_down: int, share_up: int) -> torch.Tensor:
    """Experts that the authors' layer samples; a shared matrix takes no sample."""
    torch.manual_seed(seed)
    return torch.tensor([0 if shared else int(torch.randint(0, EXPERTS, (1,))) for shared in (share_down, share_up)])

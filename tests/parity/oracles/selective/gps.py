"""GPS beside its authors' masks of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.measure import Row, largest_difference, randn
from tests.parity.models import vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("FightingFighting/GPS", "72e0c31564f46b6b6a166b54a28f2a8f48cec031")
METHODS = ("gps",)


def rows() -> list[Row]:
    """Selected inputs of the neurons of an MLP, one and three each."""
    return [Row("gps", "selected entries of a ViT's MLPs", max(_difference(inputs) for inputs in (1, 3)))]


def _difference(inputs: int) -> float:
    code = ORACLE.definitions(
        "SAM/utils_/pruning.py", "prune_by_percentile_gradient_perCell", replace={".cuda()": ""}, print=lambda *text: None
    )
    model, theirs = vits()
    tuned = attach(model, "gps", where="mlp.in mlp.out", inputs=inputs)
    names = [name for name, (site, _) in tuned.parts.items() if hasattr(site, "weight_shape")]
    for name, p in theirs.named_parameters():
        p.requires_grad_(name.removesuffix(".weight") in names)
    image, label = randn(4, 3, 32, 32, seed=3), torch.tensor([0, 1, 2, 4])
    F.cross_entropy(theirs(image), label).backward()
    weights = nn.Module()
    for name in names:
        weights.register_parameter(f"image_encoder_{name.replace('.', '_')}", theirs.get_parameter(f"{name}.weight"))
    weights.register_parameter("head", nn.Parameter(torch.ones(2)))  # the authors' summary divides by its size
    masks = code.prune_by_percentile_gradient_perCell(weights, inputs)
    tuned.select(F.cross_entropy(model(pixels), label) for pixels in (image,))
    pairs = []
    for name in names:
        own: Any = tuned.parts[name][1]
        mask = 1 - masks[f"image_encoder_{name.replace('.', '_')}"].double()  # 0 where an entry is trained
        ours = torch.zeros(mask.numel(), dtype=torch.float64)
        ours[own.own.indices.long()] = 1
        pairs.append((ours.view_as(mask), mask))
    return largest_difference(pairs)

"""Checks that the tests of several groups of training families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tests.raising import raises
from veneer.injection.errors import BaseModelError
from veneer.training.families import families, family
from veneer.training.families.family import Family
from veneer.training.prepare_base import enable_gradient_checkpointing


def assert_missing_components_are_named(pipe: Any, name: str) -> None:
    """The family matches its pipeline, and without one of the components that it needs, an error names this one."""
    assert families()[name].matches(pipe)
    for part in family(pipe).needs:
        kept = getattr(pipe, part)
        setattr(pipe, part, None)
        try:
            with raises(BaseModelError, where="missing", given=(part,)):
                family(pipe)
        finally:
            setattr(pipe, part, kept)


def assert_checkpointing_changes_no_gradient(kind: Family, prompts: list[str], blocks: Sequence[str]) -> None:
    """The gradients of the matrices of the blocks, by parts of their names, with and without gradient checkpointing."""
    tower: nn.Module = kind.tower
    with torch.no_grad():
        text = kind.encode_text(prompts)
    noisy = torch.randn(2, kind.latent_channels, 4, 6, generator=torch.Generator().manual_seed(0))
    weights = [w for name, w in tower.named_parameters() if any(part in name for part in blocks) and w.ndim > 1]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_gradient_checkpointing(tower)
        try:
            loss = kind.denoise(noisy, torch.tensor([300.0, 800.0]), text).square().mean()
            gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
        finally:
            tower.disable_gradient_checkpointing()  # type: ignore[operator]
            tower.eval()
    assert sum(gradient is not None for gradient in gradients[0]) > len(weights) // 2
    for plain, recomputed in zip(*gradients, strict=True):
        if plain is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)

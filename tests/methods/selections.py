"""Shared by the tests of methods that select entries: small models, losses of single samples, and gradients without veneer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment, hosts
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.testing.case import loss

MODELS = [("timm_vit", "vit"), ("diffusers_unet", "sd1"), ("diffusers_dit", "dit"), ("open_clip", "vit")]
"""Small models of several kinds: host and name."""


def tiny(host: str, name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A small model in double precision, and its inputs sample by sample."""
    torch.manual_seed(0)
    found = hosts.get(host)()
    model = found.tiny()[name]().double().eval()
    inputs = found.sample(model)
    return model, [{k: row_of(v, n) for k, v in inputs.items()} for n in range(2)]


def row_of(value: Any, row: int) -> Any:
    """One batch row of an input with two."""
    if isinstance(value, Tensor):
        value = value.double() if value.is_floating_point() else value
        return value[row : row + 1] if value.ndim and len(value) == 2 else value
    return {k: row_of(v, row) for k, v in value.items()} if isinstance(value, dict) else value


def losses(model: nn.Module, samples: list[dict[str, Any]]) -> Iterator[Tensor]:
    """The loss of each sample."""
    return (loss(model, sample) for sample in samples)


def plain_gradients(model: nn.Module, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Gradients of each sample's loss in all parameters of a bare model, by name."""
    plain = copy.deepcopy(model).requires_grad_()
    found = []
    for sample in samples:
        plain.zero_grad()
        loss(plain, sample).backward()
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in plain.named_parameters()})
    return found


def at_sites(tuned: Attachment, named: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of the sites, or their rows, of tensors by parameter name."""
    found = []
    for site, _ in tuned.parts.values():
        tensor = named[f"{site.path}.{site.param}".lstrip(".")]
        found.append(tensor[slice(*site.rows)] if site.rows else tensor)
    return found


def explicit(model: nn.Module, tuned: Attachment, deltas: list[Tensor]) -> nn.Module:
    """A copy of the bare model with W + ΔW at the sites."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for (site, _), delta in zip(tuned.parts.values(), deltas, strict=True):
            tensor = base_tensor(changed, site.path, site.param)
            tensor[slice(*site.rows) if site.rows else ...] += delta
    return changed

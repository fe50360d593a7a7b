"""Neurons of an image tower that an image activates."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import sites
from veneer.injection.sites import BranchSite, WeightSite

from .stored_prompts import StoredPromptError


@torch.no_grad()
def activated_neurons(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """True (images, neurons) for the hidden units of the MLPs whose input to the activation is above 0 at the class token.

    Without a class token it is the mean over tokens. The neurons of all blocks of the image tower follow each other.

    Args:
        model: a classifier with its adapters. `batches`: preprocessed images (batch, channels, height, width).
    Raises:
        StoredPromptError: the image tower has no MLP whose layers are called.
    """
    table = [site for site in sites(model) if site.tower == "vision"]
    layers = [site for site in table if isinstance(site, WeightSite) and site.role == "mlp.in" and site.called]
    if not layers:
        message = f"{type(model).__name__} has no MLP in its image tower; neurons are compared in vision transformers."
        raise StoredPromptError(message, where="mlp.in", given=type(model).__name__, expected="vision transformer")
    has_class_token = any(isinstance(site, BranchSite) and site.prefix_tokens > 0 for site in table)
    outputs: dict[str, Tensor] = {}
    hooks = {site.path: partial(_keep, outputs, site.name, has_class_token) for site in layers}
    handles = [model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    rows = []
    try:
        for images in batches:
            model(images)
            rows.append(torch.cat([outputs[site.name] for site in layers], -1) > 0)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(rows)


def _keep(outputs: dict[str, Tensor], name: str, has_class_token: bool, module: nn.Module, args: Any, output: Tensor) -> None:
    """Stores the inputs of the activation, (batch, neurons)."""
    tokens = output.flatten(1, -2)
    outputs[name] = (tokens[:, 0] if has_class_token else tokens.mean(1)).cpu()


def neuron_overlap(first: Tensor, second: Tensor) -> float:
    """|a ∧ b| / √(|a| |b|), the cosine of activated neurons (images, neurons) of two tasks; the mean over images.

    Source: Su et al., On Transferability of Prompt Tuning, NAACL 2022, "overlapping rate of activated neurons", and the authors'
    code. Deviation: the class token of images, where the paper has the mask token after the prompt.
    """
    return float(torch.nn.functional.cosine_similarity(first.float(), second.float(), dim=-1).mean())

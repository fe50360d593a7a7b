"""A small ViT of timm in float64, twice: for our attachment and for the oracle's modules."""

from __future__ import annotations

import copy
import types
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tests.parity.measure import perturb, randn
from veneer.injection import attach

WIDTH, HEADS, DEPTH, GRID = 24, 2, 2, 4


def vits(**changes: Any) -> tuple[Any, Any]:
    """Two frozen ViTs with the same perturbed weights, the second with the names of earlier versions of timm.

    Width 24, two blocks, 4×4 patches and a class token, five classes.

    Args:
        changes: arguments of `timm.create_model` to change.
    """
    torch.manual_seed(0)
    options = {"img_size": 8 * GRID, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
    model = timm.create_model("vit_base_patch16_224", **{**options, **changes}).double().eval().requires_grad_(False)
    perturb(model, 0.1)
    theirs = copy.deepcopy(model)
    for block in theirs.blocks:
        block.drop_path, block.mlp.drop = block.drop_path1, block.mlp.drop1
        block.forward = types.MethodType(_forward, block)
    return model, theirs


def _forward(block: Any, x: Tensor) -> Tensor:
    """A block without masks, as in the versions of timm that the oracles were written for."""
    x = x + block.ls1(block.attn(block.norm1(x)))
    out: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return out


def images() -> Tensor:
    """Two images for the ViT."""
    return randn(2, 3, 8 * GRID, 8 * GRID, seed=3)


def perturb_trained(model: nn.Module) -> None:
    """Puts an oracle's model into float64 and perturbs its trained parameters; called once its modules are in place."""
    model.double()
    perturb(nn.ParameterList(p for p in model.parameters() if p.requires_grad))


def layer(method: str, name: str, **options: Any) -> tuple[Any, nn.Linear]:
    """An adapter of the first block in float64, and the frozen linear layer that it belongs to.

    Args:
        name: the site in the block, such as `mlp.fc1`.
        options: of the method, besides `where`.
    """
    model, bare = vits()
    tuned = attach(model, method, **options)
    linear: nn.Linear = bare.blocks[0].get_submodule(name)
    return tuned.parts[f"blocks.0.{name}"][1].train(False), linear


def tokens(width: int = WIDTH) -> Tensor:
    """Features of a 4×4 grid and a class token, (2, 17, width)."""
    return randn(2, GRID**2 + 1, width, seed=4)


def links(ours: Any, theirs: Any, **names: str) -> list[Any]:
    """Links of parameters by name: ours to the oracle's, dotted."""
    return [(ours.get_parameter(name), link(theirs.get_parameter(other))) for name, other in names.items()]


def link(tensor: Tensor) -> Any:
    """Reads one tensor of the oracle as it is."""
    return lambda read: read(tensor)


def offset_link(parameter: Tensor, offset: Tensor | float) -> Any:
    """Reads a parameter of the oracle minus its value without an adapter; gradients are unchanged."""
    return lambda read: parameter - offset if read(parameter) is parameter else read(parameter)


def copy_projections(attention: Any, *layers: nn.Linear) -> None:
    """Copies query, key and value of a ViT's attention to three linear layers."""
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    with torch.no_grad():
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

"""PASTA beside its authors' layer of BERT, whose attention and MLP are a block of a ViT."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import DEPTH, WIDTH, images, link, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("luka-group/PASTA", "7f07d551ae026d2f1d966259757e868d4062762d")
METHODS = ("special_tokens",)
NAMESPACE = {"Optional": Optional, "Union": Union, "Tuple": tuple, "List": list}
TEXT = "initial vectors N(0, 0.02²) and dropout of the vectors in the code; [SEP] has vectors too"


class Block(nn.Module):
    """A block of a ViT with the constructor and the call of BERT's layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.block = config.block

    def forward(self, hidden_states: Tensor, *masks: object) -> Tensor:
        """The block."""
        out: Tensor = self.block(hidden_states)
        return out


def rows() -> list[Row]:
    """The class token and three registers in every block."""
    code = ORACLE.definitions("PASTA_modeling.py", "BertPastaLayer", BertLayer=Block, **NAMESPACE)
    model, theirs = vits(reg_tokens=3)
    tuned = attach(model, "special_tokens")
    count, first = 4, torch.zeros(4, 2, 4 + 16, dtype=torch.long)
    for i in range(count):
        first[i, :, i] = 1
    layers = []
    for block in theirs.blocks:
        config = options(block=block, hidden_size=WIDTH, hidden_dropout_prob=0.0)
        layer = code.BertPastaLayer(config, count).double()
        perturb(layer.special_token_embedding)
        layers.append(layer)
    theirs.blocks = nn.Sequential(*(Special(layer, first) for layer in layers))
    pairs: Any = [
        (tuned.parts[f"blocks.{depth}.stream"][1].vectors, link(layers[depth].special_token_embedding.weight))
        for depth in range(DEPTH)
    ]
    difference = measure(lambda: model(images()), lambda: theirs(images()), pairs)
    return [Row("special_tokens", "blocks of a ViT: outputs, gradients", difference, deviations=TEXT)]


class Special(nn.Module):
    """A layer of the authors with the positions of the special tokens."""

    def __init__(self, layer: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.layer, self.positions = layer, positions

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        out: Tensor = self.layer(x, special_token_indices=self.positions)
        return out

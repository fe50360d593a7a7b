"""Head pruning beside the BERT of its authors, whose heads have a mask, and their choice of heads."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.parity.measure import Row, measure, randn
from tests.parity.models import HEADS, WIDTH, copy_projections, link, tokens, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach
from veneer.methods.selective.structures.head_pruning import HeadGates, HeadPruning

ORACLE = Repository("pmichel31415/pytorch-pretrained-BERT", "18a86a7035cf8a48d16c101a66e439bf6ab342f1")
METHODS = ("head_pruning",)
LAYERS, CHOICES = 4, 1000
IMPORTANCE = "the code sums the absolute importance of each token, and divides it by its norm in each layer"


def rows() -> list[Row]:
    """An attention with gates, and pruned heads for random importances."""
    return [
        Row("head_pruning", "an attention with a mask of the heads: outputs, gradients", _attention()),
        Row("head_pruning", f"{CHOICES:,} choices which heads to prune", _choices(), deviations=IMPORTANCE),
    ]


def _attention() -> float:
    code = ORACLE.definitions("pytorch_pretrained_bert/modeling.py", "BertSelfAttention")
    model, bare = vits()
    attention, plain = model.blocks[0].attn, bare.blocks[0].attn
    config = options(hidden_size=WIDTH, num_attention_heads=HEADS, attention_probs_dropout_prob=0.0)
    theirs = code.BertSelfAttention(config).double().requires_grad_(False)
    copy_projections(plain, theirs.query, theirs.key, theirs.value)
    mask = torch.nn.Parameter(randn(HEADS))
    theirs.mask_heads, theirs._head_mask = [0], mask
    ours: Any = attach(model, "head_pruning").parts["blocks.0.attn.proj"][1]
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    pairs = [(ours.gates, link(mask)), (x, link(y))]
    return measure(lambda: attention(x), lambda: plain.proj(theirs(y, torch.zeros(()))[0]), pairs)


def _choices() -> float:
    """Share of the choices that differ, for 1 to 8 of 16 heads, with one or two protected heads in each layer."""
    code = ORACLE.definitions("examples/pruning.py", "what_to_prune", sqrt=math.sqrt)
    wrong = 0
    for seed in range(CHOICES):
        importance, pruned, protected = randn(LAYERS, HEADS * 2, seed=seed).abs(), 1 + seed % 8, 1 + seed % 2
        theirs = code.what_to_prune(importance, pruned, at_least_x_heads_per_layer=protected)
        layers = [HeadGates(WIDTH, HEADS * 2) for _ in range(LAYERS)]
        for layer, scores in zip(layers, importance, strict=True):
            layer.sensitivity.copy_(scores)
        HeadPruning(at_least=protected)._allocate(layers, LAYERS * HEADS * 2 - pruned)
        ours = {(depth, int(head)) for depth, layer in enumerate(layers) for head in (layer.kept == 0).nonzero()}
        wrong += ours != {(depth, head) for depth, heads in theirs.items() for head in heads}
    return wrong / CHOICES

"""UniPELT beside its authors' attention of BERT, low-rank layers and adapter."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from tests.parity.measure import Row, measure
from tests.parity.models import HEADS, WIDTH, copy_projections, images, link, perturb_trained, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("morningmoni/UniPELT", "53d3c3594c06a96809b636775abd32d658efb842")
METHODS = ("unipelt",)
TOKENS, RANK, REDUCTION = 3, 4, 3
COMPARED = "attention of BERT with gated prefix and low-rank layers, gated adapter, in the blocks of a ViT: outputs, gradients"
DEVIATIONS = (
    "no softmax gate shared by the parts; the adapter reads the output of the MLP, in BERT the norm of its sum with the stream"
)


class Attention(nn.Module):
    """The authors' attention in a block of a ViT, with keys and values (1, heads, p, width / heads)."""

    def __init__(self, inner: nn.Module, proj: nn.Module) -> None:
        super().__init__()
        self.inner, self.proj = inner, proj
        self.keys, self.values = (nn.Parameter(torch.zeros(1, HEADS, TOKENS, WIDTH // HEADS)) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        """x: (batch, tokens, width)."""
        prefix = tuple(table.expand(len(x), -1, -1, -1) for table in (self.keys, self.values))
        return self.proj(self.inner(x, prefix_embed=prefix)[0])


class FeedForward(nn.Module):
    """An MLP, and the authors' adapter on its output."""

    def __init__(self, mlp: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.mlp, self.adapter = mlp, adapter

    def forward(self, x: Tensor) -> Any:
        """x: (batch, tokens, width)."""
        y = self.mlp(x)
        return self.adapter(y, residual_input=y)[0]


def rows() -> list[Row]:
    """Blocks of a ViT, without dropout."""
    model, theirs = vits()
    _install(theirs)
    perturb_trained(theirs)
    theirs.eval()
    tuned = attach(model, "unipelt", tokens=TOKENS, hidden=0, rank=RANK, reduction=REDUCTION)
    pairs: Any = []
    for depth, block in enumerate(theirs.blocks):
        parts = {name: tuned.parts[f"blocks.{depth}.{name}"][1] for name in ("attn.q", "attn.v", "attn.proj", "mlp.branch")}
        pairs += _attention_links(parts, block.attn) + _adapter_links(parts["mlp.branch"], block.mlp.adapter)
    difference = measure(lambda: model(images()), lambda: theirs(images()), pairs)
    return [Row("unipelt", COMPARED, difference, deviations=DEVIATIONS)]


def _install(theirs: Any) -> None:
    layers = ORACLE.definitions("lora_layers.py", "LoRALayer", "LoRA_Linear", Optional=Optional, List=list)
    adapters = ORACLE.definitions("transformers/adapters/modeling.py", "Activation_Function_Class", "Adapter")
    bert = ORACLE.definitions("transformers/models/bert/modeling_bert.py", "BertSelfAttention", LoRA_Linear=layers.LoRA_Linear)
    config = options(
        hidden_size=WIDTH, num_attention_heads=HEADS, add_lora=True, lora_r=RANK, lora_alpha=16, add_lora_gate=True,
        add_central_gate=False, add_prefix_gate=True, attention_probs_dropout_prob=0.0, is_decoder=False,
    )  # fmt: skip
    for block in theirs.blocks:
        attention = bert.BertSelfAttention(config, layer_idx=0).double()
        for layer in (attention.query, attention.key, attention.value):
            layer.weight.requires_grad_(False)
            layer.bias.requires_grad_(False)
            layer.merge_weights = False
        copy_projections(block.attn, attention.query, attention.key, attention.value)
        adapter = adapters.Adapter(WIDTH, WIDTH // REDUCTION, add_layer_norm_before=False, add_gate=True)
        block.attn, block.mlp = Attention(attention, block.attn.proj), FeedForward(block.mlp, adapter)


def _attention_links(parts: dict[str, Any], theirs: Any) -> list[Any]:
    pairs: list[Any] = []
    for name, layer in (("attn.q", theirs.inner.query), ("attn.v", theirs.inner.value)):
        pairs += [(parts[name].down, link(layer.lora_A)), (parts[name].up, link(layer.lora_B))]
        pairs += _gate_links(parts[name], layer.lora_gate)
    prefix = parts["attn.proj"]
    pairs += [(prefix.keys, _table(theirs.keys)), (prefix.values, _table(theirs.values))]
    return pairs + _gate_links(prefix, theirs.inner.prefix_gate)


def _adapter_links(ours: Any, theirs: Any) -> list[Any]:
    down, up = theirs.adapter_down[0], theirs.adapter_up
    pairs = [(ours.down, down.weight), (ours.down_bias, down.bias), (ours.up, up.weight), (ours.up_bias, up.bias)]
    return [(tensor, link(other)) for tensor, other in pairs] + _gate_links(ours, theirs.gate)


def _gate_links(ours: Any, gate: nn.Linear) -> list[Any]:
    return [(ours.gate.weight, link(gate.weight)), (ours.gate.bias, link(gate.bias))]


def _table(keys: Tensor) -> Any:
    """(1, heads, p, width / heads) as (p, width)."""
    return lambda read: read(keys)[0].transpose(0, 1).flatten(1)

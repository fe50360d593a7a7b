"""ARC beside its authors' encoder blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, HEADS, WIDTH, images, link, perturb_trained, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("DavidYanAnDe/ARC", "8227d57e8d853b68ef45fa2fc60230660d597af3")
METHODS = ("arc",)
RANK = 5


class Blocks(nn.Module):
    """The authors' encoders with their shared projections, in the place of a ViT's blocks."""

    def __init__(self, encoder: Any, config: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList(encoder(config) for _ in range(DEPTH)).requires_grad_(False)
        for name, p in self.layer.named_parameters():
            p.requires_grad_("scale" in name)
        self.attn, self.mlp = (nn.Parameter(torch.zeros(WIDTH, RANK)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The blocks, one after the other."""
        for encoder in self.layer:
            x = encoder(x, self.attn, self.attn.T, self.mlp, self.mlp.T)
        return x


def rows() -> list[Row]:
    """Blocks of a ViT, without dropout."""
    model, theirs = vits()
    layers = {"Linear": nn.Linear, "Softmax": nn.Softmax, "Dropout": nn.Dropout, "LayerNorm": nn.LayerNorm}
    code = ORACLE.definitions("Model/ARC_new.py", "ACT2FN", "Attention", "MLP", "Encoder", **layers)
    shape = {"num_heads": HEADS, "attention_drop_rate": 0.0, "mlp_drop_rate": 0.0, "mlp_dim": 4 * WIDTH}
    blocks = Blocks(code.Encoder, options(hidden_size=WIDTH, transformer=shape, adapter_dim=RANK, adapter_dropout=0.0)).double()
    for encoder, block in zip(blocks.layer, theirs.blocks, strict=True):
        _copy(encoder, block)
    theirs.blocks = blocks
    perturb_trained(theirs)
    theirs.eval()
    tuned = attach(model, "arc", rank=RANK)
    shared: Any = next(iter(tuned.parts.values()))[1].shared
    pairs: Any = [(shared.U[f"{name}_{WIDTH}"], link(getattr(blocks, name))) for name in ("attn", "mlp")]
    for depth, encoder in enumerate(blocks.layer):
        for site, name in (("attn.qkv", "att"), ("mlp.fc1", "mlp")):
            ours: Any = tuned.parts[f"blocks.{depth}.{site}"][1]
            pairs += [
                (ours.scale, _row(encoder.get_parameter(f"{name}_scale"))),
                (ours.shift, link(encoder.get_parameter(f"{name}_scale_bias"))),
            ]
    return [Row("arc", "blocks of a ViT: outputs, gradients", measure(lambda: model(images()), lambda: theirs(images()), pairs))]


def _row(tensor: Tensor) -> Any:
    return lambda read: read(tensor)[0]


def _copy(encoder: Any, block: Any) -> None:
    queries = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
    for linear, (weight, bias) in zip(
        (encoder.attention.query, encoder.attention.key, encoder.attention.value), queries, strict=True
    ):
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    pairs = (
        (encoder.attention.projective, block.attn.proj), (encoder.mlp.fc1, block.mlp.fc1), (encoder.mlp.fc2, block.mlp.fc2),
        (encoder.att_layer_norm, block.norm1), (encoder.fnn_layer_norm, block.norm2),
    )  # fmt: skip
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())

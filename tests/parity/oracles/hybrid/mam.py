"""MAM adapter beside its authors' attention, prefix and adapter layer of BART."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor, nn

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, HEADS, WIDTH, copy_projections, images, link, links, perturb_trained, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("jxhe/unify-parameter-efficient-tuning", "3222ce2c0079566a28043e22380eb4ab6ad14389")
METHODS = ("mam",)
TOKENS, HIDDEN, BOTTLENECK, SCALE = 3, 5, 7, 0.6
NAMES = {"down": "down_proj.weight", "down_bias": "down_proj.bias", "up": "up_proj.weight", "up_bias": "up_proj.bias"}
COMPARED = "prefix module, attention and adapter layer of BART's encoder in the blocks of a ViT: outputs, gradients"
DEVIATIONS = "the code has a table and an MLP of keys and values for each of BART's three kinds of attention"


class Attention(nn.Module):
    """The authors' attention in a block of a ViT. `state` has the keys and values of the pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.state = inner, None

    def forward(self, x: Tensor) -> Any:
        """x: (batch, tokens, width)."""
        return self.inner(x, prefix_state=self.state)[0]


class FeedForward(nn.Module):
    """An MLP with the authors' adapter layer in parallel, as their `BartEncoderLayer` has it."""

    def __init__(self, mlp: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.mlp, self.adapter = mlp, adapter

    def forward(self, x: Tensor) -> Any:
        """x: (batch, tokens, width)."""
        return self.mlp(x) + self.adapter(x, add_residual=False)


def rows() -> list[Row]:
    """Blocks of a ViT, without dropout."""
    model, theirs = vits()
    code = ORACLE.definitions("petl/petl_factory.py", "Prefix", "Adapter_Layer", RobertaConfig=type(None))
    _install(theirs, code.Adapter_Layer)
    config = options(num_hidden_layers=DEPTH, decoder_attention_heads=HEADS, d_model=WIDTH)
    theirs.prefix = code.Prefix(options(mid_dim=HIDDEN, attn_bn=TOKENS, prefix_dropout=0.0), config)
    perturb_trained(theirs)
    theirs.eval()
    tuned = attach(model, "mam", tokens=TOKENS, hidden=HIDDEN, bottleneck=BOTTLENECK, scale=SCALE)
    difference = measure(lambda: model(images()), lambda: _run(theirs), _links(tuned, theirs))
    return [Row("mam", COMPARED, difference, deviations=DEVIATIONS)]


def _install(theirs: Any, adapter: Any) -> None:
    code = ORACLE.definitions(
        "src/transformers/models/bart/modeling_bart.py", "BartAttention", Optional=Optional, Tuple=tuple, Dict=dict,
    )  # fmt: skip
    config = options(attn_mode="prefix", attn_option="concat", attn_composition="add")
    for block in theirs.blocks:
        attention = code.BartAttention(WIDTH, HEADS, config=config, cache_key="encoder").double().requires_grad_(False)
        copy_projections(block.attn, attention.q_proj, attention.k_proj, attention.v_proj)
        attention.out_proj.load_state_dict(block.attn.proj.state_dict())
        layer = adapter(None, WIDTH, BOTTLENECK, init_option="lora", adapter_scalar=str(SCALE), adapter_layernorm_option="none")
        block.attn, block.mlp = Attention(attention), FeedForward(block.mlp, layer)


def _run(theirs: Any) -> Any:
    x = images()
    for block, state in zip(theirs.blocks, theirs.prefix(len(x), device="cpu"), strict=True):
        block.attn.state = state
    return theirs(x)


def _links(tuned: Any, theirs: Any) -> Any:
    prefix = theirs.prefix
    shared = tuned.parts["blocks.0.attn.proj"][1].shared
    pairs = [(shared.table, link(prefix.wte_enc.weight))]
    pairs += links(shared.layer, prefix.control_trans_enc[0], weight="weight", bias="bias")
    for depth, block in enumerate(theirs.blocks):
        out, last = tuned.parts[f"blocks.{depth}.attn.proj"][1].out, prefix.control_trans_enc[2]
        pairs += [(out.weight, _rows(last.weight, depth)), (out.bias, _rows(last.bias, depth))]
        pairs += links(tuned.parts[f"blocks.{depth}.mlp.branch"][1], block.mlp.adapter, **NAMES)
    return pairs


def _rows(tensor: Tensor, depth: int) -> Any:
    return lambda read: read(tensor)[2 * depth * WIDTH : 2 * (depth + 1) * WIDTH]

"""LLaMA-Adapter V2 beside its authors' blocks with biases, scales and gated prompts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Optional

import timm
import torch
from torch import nn

from tests.parity.measure import Row, measure
from tests.parity.models import HEADS, WIDTH, link, offset_link, perturb_trained, tokens, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("OpenGVLab/LLaMA-Adapter", "521a09da84f70f6913d54b7421afa24010319e47")
METHODS = ("llama_adapter_v2",)
LAYERS = {
    "attn.proj": "attention.wo",
    "mlp.fc1_g": "feed_forward.w1",
    "mlp.fc1_x": "feed_forward.w3",
    "mlp.fc2": "feed_forward.w2",
}
TEXT = (
    "no early fusion of image features; the code for 65B scales the input of a layer, the paper and veneer its output, so the "
    "scales are 1 on both sides"
)


def rows() -> list[Row]:
    """A block of the code for 65B, without rotary positions; the authors round the gate to half precision and add in place."""
    names = ("ModelArgs", "RMSNorm", "reshape_for_broadcast", "apply_rotary_emb", "forward_linear_with_scale_and_bias")
    linear = {f"{kind}ParallelLinear": _linear for kind in ("Column", "Row")}
    process = options(get_model_parallel_world_size=lambda: 1, get_model_parallel_rank=lambda: 0)
    code = ORACLE.definitions(
        "llama_adapter_v2_chat65b/llama/model.py", *names, "Attention", "FeedForward", "TransformerBlock",
        replace={".tanh().half()": ".tanh()", ".float()": ".double()", "output += ": "output = output + "},
        dataclass=dataclass, Optional=Optional, Tuple=tuple, fs_init=process, **linear,
    )  # fmt: skip
    arguments = code.ModelArgs(dim=WIDTH, n_heads=HEADS, multiple_of=8, norm_eps=1e-6, add_bias=True)
    theirs = code.TransformerBlock(0, arguments).requires_grad_(False)
    trained = [p.requires_grad_() for name, p in theirs.named_parameters() if "bias" in name or "gate" in name or "norm" in name]
    perturb_trained(theirs)
    block, pairs = _ours(theirs)
    assert len(trained) == len(pairs) + 2  # the biases of query, key and value are one tensor
    prompt = nn.Parameter(torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    adapter: Any = block.tuned.parts["blocks.0.attn.module"][1]
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    pairs += [(adapter.prompt, link(prompt)), (x, link(y))]
    rotary = torch.ones(x.shape[1], WIDTH // HEADS // 2, dtype=torch.complex128)
    difference = measure(lambda: block(x), lambda: theirs(y, 0, rotary, None, prompt[None]), pairs)
    return [Row("llama_adapter_v2", "a block with gated units: outputs, gradients", difference, deviations=TEXT)]


def _ours(theirs: Any) -> tuple[Any, list[Any]]:
    """A block of a ViT with the authors' units and norms, and the links of its biases, norms and gates."""
    model, _ = vits(
        mlp_layer=timm.layers.SwiGLU,
        act_layer=nn.SiLU,
        mlp_ratio=8 / 3,
        norm_layer=functools.partial(timm.layers.RmsNorm, eps=1e-6),
    )
    block = model.blocks[0]
    for name in ("attn.qkv", *LAYERS):
        block.get_submodule(name).bias.zero_()
    attention = theirs.attention
    for linear, weight in zip((attention.wq, attention.wk, attention.wv), block.attn.qkv.weight.chunk(3), strict=True):
        linear.weight.copy_(weight)
    for ours, name in LAYERS.items():
        theirs.get_submodule(name).weight.copy_(block.get_submodule(ours).weight)
    block.tuned = attach(model, "llama_adapter_v2", tokens=5)
    parts: Any = {name.removeprefix("blocks.0."): adapter for name, (_, adapter) in block.tuned.parts.items()}
    biases = [attention.wq_bias, attention.wk_bias, attention.wv_bias]
    pairs: Any = [
        (parts["attn.qkv"].shift, lambda read: torch.cat([read(bias) for bias in biases])),
        (parts["attn.module"].gate, lambda read: read(attention.gate).flatten()),
        (parts["norm1.weight"].delta, offset_link(theirs.attention_norm.weight, block.norm1.weight)),
        (parts["norm2.weight"].delta, offset_link(theirs.ffn_norm.weight, block.norm2.weight)),
    ]
    pairs += [(parts[ours].shift, link(theirs.get_parameter(f"{name}_bias"))) for ours, name in LAYERS.items()]
    return block, pairs


def _linear(width: int, height: int, **parallel: object) -> nn.Linear:
    """A layer of fairscale on one device."""
    return nn.Linear(width, height, bias=False)

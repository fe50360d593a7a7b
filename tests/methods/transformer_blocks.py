"""One block of a ViT, an open_clip tower, a UNet and a DiT, written out around functions for attention and MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.attentions import projections
from tests.methods.bottlenecks import random, stirred
from veneer.injection import attach, hosts

Attend = Callable[[str, Any, Tensor, Tensor], Tensor]  # ("attn" or "xattn", module, tokens, context) -> output
Mlp = Callable[[Any, Tensor], Tensor]  # (module, its input) -> output

PATHS = {
    "timm_vit": ("vit", "blocks.1"),
    "open_clip": ("vit", "visual.transformer.resblocks.1"),
    "transformers_vit": ("vit", "layers.1"),
    "diffusers_unet": ("sd1", "mid_block.attentions.0.transformer_blocks.0"),
    "diffusers_dit": ("dit", "transformer_blocks.1"),
}


@dataclass
class Block:
    """A block with adapters and the same block of the base model, their inputs, and the adapters by role."""

    host: str
    base: Any
    tuned: Any
    inputs: dict[str, Tensor]
    adapters: dict[str, Any]
    attachment: Any

    def __call__(self) -> Tensor:
        """The output of the block with adapters."""
        output = self.tuned(self.inputs["x"], **{k: v for k, v in self.inputs.items() if k != "x"})
        return output[0] if isinstance(output, tuple) else output

    def written_out(self, attend: Attend, mlp: Mlp) -> Tensor:
        """The output of the base block, around these functions."""
        b, x = self.base, self.inputs["x"]
        if self.host == "diffusers_unet":
            context = self.inputs["encoder_hidden_states"]
            x = x + attend("attn", b.attn1, *(b.norm1(x),) * 2)
            x = x + attend("xattn", b.attn2, b.norm2(x), context)
            return x + mlp(b.ff, b.norm3(x))
        if self.host == "diffusers_dit":
            normed, gate, shift, scale, mlp_gate = b.norm1(x, self.inputs["timestep"], self.inputs["class_labels"], x.dtype)
            x = x + gate.unsqueeze(1) * attend("attn", b.attn1, normed, normed)
            return x + mlp_gate.unsqueeze(1) * mlp(b.ff, b.norm3(x) * (1 + scale[:, None]) + shift[:, None])
        attn = getattr(b, "attn", None) or b.attention
        first, second = ((getattr(b, n, None)) for n in ("ln_1", "ln_2"))
        first = first or getattr(b, "norm1", None) or b.layernorm_before
        second = second or getattr(b, "norm2", None) or b.layernorm_after
        x = x + attend("attn", attn, *(first(x),) * 2)
        return x + mlp(b.mlp, second(x))


def equal_models(host: str, key: str) -> list[nn.Module]:
    """Two equal small models in float64, whose parameters are perturbed."""
    models: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(hosts.get(host)().tiny()[key]().double().eval())
        with torch.no_grad():
            for p in models[-1].parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
    return models


def block_with(host: str, method: str, **options: Any) -> Block:
    """A block of a small model, in float64, with adapters whose tensors are perturbed."""
    key, path = PATHS[host]
    models = equal_models(host, key)
    tuned = attach(models[1], method, **options)
    stirred(tuned)
    base: Any = models[0].get_submodule(path)
    adapters = {site.role: adapter for site, adapter in tuned.parts.values() if site.name.startswith(f"{path}.")}
    norms = ("norm1", "ln_1", "layernorm_before")
    norm = next(m for name in norms if (m := getattr(base, name, None)) is not None)
    width = norm.linear.in_features if hasattr(norm, "linear") else norm.normalized_shape[0]
    inputs = {"x": random(2, 6, width)}
    if host == "diffusers_unet":
        inputs["encoder_hidden_states"] = random(2, 5, base.attn2.cross_attention_dim, seed=1)
    if host == "diffusers_dit":
        inputs |= {"timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([1, 4])}
    return Block(host, base, models[1].get_submodule(path), inputs, adapters, tuned)


def layers_of(attn: Any) -> list[Callable[[Tensor], Tensor]]:
    """The layers of queries, keys, values and of the output of an attention module."""
    if hasattr(attn, "to_q"):
        return [attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]]
    return [lambda x, pair=pair: F.linear(x, *pair) for pair in projections(attn)]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v for each head; q, k, v (B, N, width)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def heads_of(attn: Any) -> int:
    """Number of heads of an attention module."""
    number: int = next(n for name in ("heads", "num_heads", "num_attention_heads") if (n := getattr(attn, name, None)))
    return number


def compare(block: Block, expected: Tensor) -> None:
    """Values and gradients of every trained parameter of the block, all of which get one."""
    got = block()
    torch.testing.assert_close(got, expected)
    parameters = {id(p): p for adapter in block.adapters.values() for p in adapter.parameters()}.values()
    pairs = (torch.autograd.grad(y.square().sum(), list(parameters)) for y in (got, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0

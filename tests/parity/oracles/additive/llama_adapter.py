"""LLaMA-Adapter beside its authors' attention with zero-initialized gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch

from tests.parity.measure import Row, measure
from tests.parity.models import HEADS, WIDTH, link, perturb_trained, tokens, vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("OpenGVLab/LLaMA-Adapter", "521a09da84f70f6913d54b7421afa24010319e47")
METHODS = ("llama_adapter",)


def rows() -> list[Row]:
    """One attention without rotary positions and biases; the authors round the gate to half precision."""
    model, _ = vits()
    attention = model.blocks[0].attn
    attention.qkv.bias.zero_()
    attention.proj.bias.zero_()
    swaps = {".tanh().half()": ".tanh()", ".float()": ".double()"}
    names = ("ModelArgs", "reshape_for_broadcast", "apply_rotary_emb", "Attention")
    code = ORACLE.definitions(
        "alpaca_finetuning_v1/llama/model.py",
        *names,
        replace=swaps,
        Linear=torch.nn.Linear,
        dataclass=dataclass,
        Optional=Optional,
        Tuple=tuple,
    )
    theirs = code.Attention(code.ModelArgs(dim=WIDTH, n_heads=HEADS)).requires_grad_(False)
    theirs.gate.requires_grad_(True)
    perturb_trained(theirs)
    for linear, weight in zip((theirs.wq, theirs.wk, theirs.wv), attention.qkv.weight.chunk(3), strict=True):
        linear.weight.copy_(weight)
    theirs.wo.weight.copy_(attention.proj.weight)
    tuned = attach(model, "llama_adapter", tokens=5)
    ours: Any = tuned.parts["blocks.0.attn.module"][1]
    prompt = torch.nn.Parameter(torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    x = tokens()
    length = x.shape[1]
    rotary, mask = (
        torch.ones(length, WIDTH // HEADS // 2, dtype=torch.complex128),
        torch.zeros(1, 1, length, length, dtype=torch.float64),
    )
    pairs = [(ours.prompt, link(prompt)), (ours.gate, lambda read: read(theirs.gate).view(ours.gate.shape))]
    difference = measure(lambda: attention(x), lambda: theirs(x, 0, rotary, mask, prompt[None]), pairs)
    return [Row("llama_adapter", "an attention: outputs, gradients", difference)]

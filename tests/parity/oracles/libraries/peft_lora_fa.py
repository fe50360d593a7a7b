"""LoRA-FA beside peft's LoRA, whose A is frozen by peft's optimizer of LoRA-FA."""

from __future__ import annotations

from typing import Any

import peft
from peft.optimizers import create_lorafa_optimizer

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, images, link, perturb_trained, vits
from tests.parity.oracle import Package
from veneer.injection import attach

ORACLE = Package("peft", "peft")
METHODS = ("lora_fa",)
TEXT = "peft's optimizer multiplies the gradient of B by (A Aᵀ)⁻¹ / s², which the first version of the paper does not have"


def rows() -> list[Row]:
    """The MLPs of a ViT; A is copied, and only B is trained on both sides."""
    model, theirs = vits()
    peer: Any = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["fc1", "fc2"]))
    perturb_trained(peer)
    create_lorafa_optimizer(peer, r=3, lora_alpha=6, lr=1e-3)
    peer.eval()
    tuned = attach(model, "lora_fa", where="mlp.in mlp.out", rank=3, alpha=6.0)
    pairs: Any = []
    for depth in range(DEPTH):
        for name in ("fc1", "fc2"):
            adapter: Any = tuned.parts[f"blocks.{depth}.mlp.{name}"][1]
            layer = peer.base_model.model.blocks[depth].mlp.get_submodule(name)
            adapter.down.copy_(layer.lora_A["default"].weight.detach())
            pairs.append((adapter.up, link(layer.lora_B["default"].weight)))
    assert {name.split(".")[-3] for name, p in peer.named_parameters() if p.requires_grad} == {"lora_B"}
    assert len(list(tuned.parameters())) == len(pairs)
    difference = measure(lambda: model(images()), lambda: peer.base_model.model(images()), pairs)
    return [Row("lora_fa", "the MLPs of a ViT: outputs, gradients", difference, deviations=TEXT)]

"""DiffFit in a UNet of Stable Diffusion beside mkshing's port."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import link, perturb_trained
from tests.parity.oracle import Repository
from veneer.hosts.diffusers_unet import DiffusersUNet
from veneer.injection import attach

ORACLE = Repository("mkshing/DiffFit-pytorch", "78dc2d1a710590644637ac8c269ce8b2aa430020", third_party=("difffit",))
METHODS = ("difffit",)
WHERE = "bias norm attn xattn mlp not:mlp.in not:mlp.out"
PARTS = "difffit_pytorch/diffusers_models/"
SCALES = {"to_q": "gamma_q", "to_k": "gamma_k", "to_v": "gamma_v", "to_out.0": "gamma_fnn"}
BRANCHES = {"attn1": "gamma_attn1", "attn2": "gamma_attn2", "ff": "gamma_ff"}


def rows() -> list[Row]:
    """The UNet without its text encoder, with the scales of the port."""
    torch.manual_seed(0)
    model: Any = DiffusersUNet().tiny()["sd1"]().double().requires_grad_(False)
    perturb(model, 0.05)
    theirs, before = _port(model), {name: p.detach() for name, p in model.named_parameters()}
    tuned = attach(model, "difffit", where=WHERE)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(p.numel() for p in tuned.parameters())
    mine = {name: nn.Parameter(torch.zeros_like(p)) for name, p in trained.items()}
    names = {id(p): name for name, p in model.named_parameters()}
    sample: Any = DiffusersUNet().sample(model)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in sample.items()}

    def run() -> Tensor:
        values: dict[str, Tensor] = {}
        for name, (site, adapter) in tuned.parts.items():
            changes = _changes(name, site, mine, before)
            values |= {names[id(p)]: changes[leaf] for leaf, p in adapter.named_parameters()}
        output: Tensor = functional_call(model, values, kwargs=inputs).sample
        return output

    pairs = [(mine[name], link(p)) for name, p in trained.items()]
    text = (
        "the default has other scales: after queries, keys, values and the first layer of the MLP; db is added after γ, in the "
        "port before"
    )
    difference = measure(run, lambda: theirs(**inputs).sample, pairs)
    return [Row("difffit", f'`where="{WHERE}"`, UNet of SD 1.5: outputs, gradients', difference, deviations=text)]


def _changes(name: str, site: Any, values: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters from the port's: `gain` = γ − 1, `shift` = γ (b' − b) of a layer, `delta` = t' − t."""
    if name.endswith(".branch"):
        block, branch = name.removesuffix(".branch").rsplit(".", 1)
        return {"gain": values[f"{block}.{BRANCHES[branch]}"] - 1}
    if not hasattr(site, "path") or getattr(site, "kind", "") != "linear":
        return {"delta": values[name] - before[name]}
    attention, layer = next((site.path.removesuffix(f".{end}"), end) for end in SCALES if site.path.endswith(f".{end}"))
    gamma = values[f"{attention}.processor.{SCALES[layer]}"]
    if not site.bias:
        return {"gain": gamma - 1}
    return {"gain": gamma - 1, "shift": gamma * (values[site.bias] - before[site.bias])}


def _port(model: Any) -> Any:
    """A copy of the UNet with the port's transformer blocks, and what the port trains, perturbed."""
    attention = ORACLE.definitions(
        f"{PARTS}attention_processor.py", "Attention", "AttnProcessor", "AttnProcessor2_0", "DiffFitAttnProcessor",
        Optional=Any, Callable=Any, Union=Any, replace={"Optional[": "tuple[", "Union[": "tuple["},
    )  # fmt: skip
    code = ORACLE.definitions(
        f"{PARTS}attention.py", "BasicTransformerBlock", "FeedForward", "GEGLU", Attention=attention.Attention,
        replace={"Optional[": "tuple["},
    )  # fmt: skip
    utils = ORACLE.definitions("difffit_pytorch/utils.py", "mark_only_biases_as_trainable")
    theirs = copy.deepcopy(model)
    for parent in [module for module in theirs.modules() if hasattr(module, "transformer_blocks")]:
        for index, old in enumerate(parent.transformer_blocks):
            heads, width = old.attn1.heads, old.norm1.weight.shape[0]
            block = code.BasicTransformerBlock(
                width, heads, width // heads, cross_attention_dim=old.attn2.to_k.in_features, activation_fn="geglu"
            ).double()
            missing = block.load_state_dict(old.state_dict(), strict=False)
            assert not missing.unexpected_keys
            assert all("gamma" in key for key in missing.missing_keys)
            for one in (block.attn1, block.attn2):
                one.set_processor(attention.DiffFitAttnProcessor(width))
            parent.transformer_blocks[index] = block
    utils.mark_only_biases_as_trainable(theirs)
    perturb_trained(theirs)
    return theirs.eval()

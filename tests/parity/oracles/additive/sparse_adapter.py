"""SparseAdapter beside its authors' pruners."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.measure import Row, largest_difference, randn
from tests.parity.oracle import Repository, float64, options
from veneer.injection.sites import BranchSite, Port
from veneer.methods.additive.bottleneck.sparse_adapter import SparseBottleneck

ORACLE = Repository("Shwai-He/SparseAdapter", "b19008432c5983ecae3f054e74aa8a1dac19f28a")
METHODS = ("sparse_adapter",)
WIDTH, HIDDEN, DEPTH = 24, 10, 3
PRUNERS = {"snip": "SNIP", "magnitude": "Mag", "synflow": "SynFlow"}


class Network(nn.Module):
    """Three frozen layers, each with an adapter of the authors."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        config = options(hidden_size=WIDTH)
        self.adapters = nn.ModuleList(
            adapter(config=config, d_model=WIDTH, bottleneck=HIDDEN, adapter_layernorm_option="none") for _ in range(DEPTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The layers, one after the other."""
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            x = adapter(torch.tanh(layer(x)))
        return x


def rows() -> list[Row]:
    """Entries kept by each score at three ratios, and outputs after pruning."""
    torch.manual_seed(0)
    with float64():
        differences = [_difference(score, ratio) for score in PRUNERS for ratio in (0.2, 0.5, 0.8)]
    return [Row("sparse_adapter", "selected entries, outputs after pruning", max(differences))]


def _difference(score: str, ratio: float) -> float:
    petl = ORACLE.definitions("petl/petl_factory.py", "init_bert_weights", "Adapter_Layer")
    pruners = ORACLE.definitions(
        "src/transformers/pruning/pruners.py", Adapter_Layer=petl.Adapter_Layer, autocast=contextlib.nullcontext
    )
    theirs = Network(petl.Adapter_Layer).double()
    with torch.no_grad():
        for adapter in theirs.adapters:
            for linear in (adapter.down_proj, adapter.up_proj):
                linear.weight.normal_(std=0.02)
                linear.bias.zero_()
    data = [randn(5, 7, WIDTH, seed=seed) for seed in range(3)]
    masks = [
        (mask, linear.weight) for a in theirs.adapters for mask, linear in ((a.down_mask, a.down_proj), (a.up_mask, a.up_proj))
    ]
    pruner = getattr(pruners, PRUNERS[score])(masks)
    _score(pruner, score, theirs, data)
    pruner.mask(ratio, "global")
    adapters = _ours(score, ratio, theirs, data)
    entries = torch.cat([(matrix.dense() != 0).double().flatten() for a in adapters for matrix in (a.down, a.up)])
    reference = torch.cat([mask.double().flatten() for mask, _ in masks])
    with torch.no_grad():
        return largest_difference([(entries, reference), (_run(theirs, adapters, data[0]), theirs(data[0]))])


def _loss(y: Tensor) -> Tensor:
    return (y**2 * torch.arange(WIDTH)).mean()


def _score(pruner: Any, score: str, theirs: Any, data: list[Tensor]) -> None:
    if score == "snip":
        pruner.score(theirs, [{"x": x} for x in data], "cpu", lambda model, batch: _loss(model(batch["x"])))
    elif score == "magnitude":
        pruner.score(theirs, None, "cpu")
    else:
        theirs.__dict__["base_model"] = options(n_embd=WIDTH)
        pruner.score(options(module=theirs, state_dict=theirs.state_dict), [{"input_ids": torch.zeros(2, 7)}], "cpu")


def _ours(score: str, ratio: float, theirs: Any, data: list[Tensor]) -> list[Any]:
    method: Any = SparseBottleneck(bottleneck=HIDDEN, keep_ratio=ratio, score=score)
    sites = [
        BranchSite(name=f"b{i}", role="mlp", read=Port("x", "in"), write=Port("x", "out"), width=WIDTH) for i in range(DEPTH)
    ]
    shared, adapters = method.build_shared(sites).double(), [method.build(site).double() for site in sites]
    with torch.no_grad():
        for adapter, other in zip(adapters, theirs.adapters, strict=True):
            adapter.add_module("shared", shared)
            adapter.initial_down.copy_(other.down_proj.weight)
            adapter.initial_up.copy_(other.up_proj.weight)
    method.select(list(zip(sites, adapters, strict=True)), (_loss(_run(theirs, adapters, x)) for x in data))
    return adapters


def _run(theirs: Any, adapters: list[Any], x: Tensor) -> Tensor:
    for layer, adapter in zip(theirs.layers, adapters, strict=True):
        y = torch.tanh(layer(x))
        x = adapter.output(y, y)
    return x

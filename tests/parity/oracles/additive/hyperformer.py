"""HyperFormer and HyperFormer++ beside their authors' hypernetworks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.parity.measure import Row, copy_values, largest_difference, perturb, randn
from tests.parity.models import link, links
from tests.parity.oracle import Repository, modules
from veneer.injection.sites import BranchSite, Port
from veneer.methods.additive.hyper.hyperformer import HyperFormer
from veneer.methods.additive.hyper.hyperformer_plus_plus import HyperFormerPlusPlus

ORACLE = Repository("rabeehk/hyperformer", "56b0f993eeec62f5a8c962704739912b5f039a9b")
METHODS = ("hyperformer", "hyperformer_plus_plus")
WIDTH, LAYERS, TASKS = 48, 3, ("a", "b")
FILES = ("adapter_outputs", "adapter_utils", "adapter_configuration", "adapter_modeling", "adapter_controller")
NAMES = {
    "down": "down_sampler_hyper_net.weight_generator.0", "down_bias": "down_sampler_hyper_net.bias_generator.0",
    "up": "up_sampler_hyper_net.weight_generator.0", "up_bias": "up_sampler_hyper_net.bias_generator.0",
    "norm": "post_layernorm_hypernet.weight_generator", "norm_bias": "post_layernorm_hypernet.bias_generator",
}  # fmt: skip
SITES = [
    BranchSite(name=f"b.{d}.{r}", role=r, depth=d, tower="v", read=Port("r", "in"), write=Port("w", "out"), width=WIDTH)
    for d in range(LAYERS)
    for r in ("attn", "mlp")
]


def rows() -> list[Row]:
    """One generator for all layers, and one for each role."""
    compared = "adapters of two tasks in three layers: outputs, gradients"
    return [Row("hyperformer", compared, _difference(False)), Row("hyperformer_plus_plus", compared, _difference(True))]


def _code() -> Any:
    with modules(hf={}):
        return {name: ORACLE.module(f"hyperformer/adapters/{name}.py", f"hf.{name}") for name in FILES}


def _config(code: Any) -> Any:
    config = code["adapter_configuration"].MetaAdapterConfig()
    config.input_dim, config.device, config.tasks, config.task_to_embeddings = WIDTH, "cpu", list(TASKS), None
    config.reduction_factor, config.non_linearity, config.conditional_layer_norm = 16, "gelu_new", True
    config.add_layer_norm_before_adapter, config.add_layer_norm_after_adapter = False, True
    return config


def _difference(shared: bool) -> float:
    torch.manual_seed(0)
    code = _code()
    config, modeling = _config(code), code["adapter_modeling"]
    tasks = code["adapter_utils"].TaskEmbeddingController(config).double()
    kind = modeling.AdapterLayersOneHyperNetController if shared else modeling.AdapterLayersHyperNetController
    theirs = kind(config, LAYERS).double()
    call = code["adapter_controller"].MetaLayersAdapterController(config).double()
    perturb(nn.ModuleList([tasks, theirs]), 0.2)
    arguments: dict[str, Any] = {"tasks": TASKS, "reduction": 16}
    method: Any = HyperFormerPlusPlus(**arguments) if shared else HyperFormer(generators="role", **arguments)
    network = method.build_shared(SITES).double()
    adapters: Any = [method.build(site).double() for site in SITES]
    for adapter in adapters:
        adapter.add_module("shared", network)
    pairs = _pairs(network, theirs, tasks, shared)
    copy_values(pairs)
    outputs = []
    for index, task in enumerate(TASKS):
        method.select_task(list(zip(SITES, adapters, strict=True)), index)
        for place, (site, adapter) in enumerate(zip(SITES, adapters, strict=True)):
            y, weight = randn(2, 5, WIDTH, seed=10 * index + place), randn(2, 5, WIDTH, seed=100 + place)
            block = theirs(tasks(task), site.depth)
            reference = call(y, block.self_attention if site.role == "attn" else block.feed_forward)
            outputs.append((adapter.output(y, y), reference))
            torch.stack([(out * weight).sum() for out in outputs[-1]]).sum().backward()
    return largest_difference([*outputs, *((ours.grad, read(lambda t: t.grad)) for ours, read in pairs)])


def _pairs(network: Any, theirs: Any, tasks: Any, shared: bool) -> Any:
    embed = theirs.task_hypernet.task_embeding_generator
    pairs = [
        *links(network.hidden, embed[0], weight="weight", bias="bias"),
        *links(network.projection, embed[2], weight="weight", bias="bias"),
    ]
    pairs += links(network.norm, theirs.LayerNorm, weight="weight", bias="bias")
    pairs += [(network.layers, link(theirs.layer_id_embeddings.weight)), (network.tasks, _stacked(tasks))]
    if shared:  # the authors' first position is the feed-forward part
        pairs.append((network.positions, lambda read: read(theirs.adapters_block_type.weight).flip(0)))
    roles = {f"all-{WIDTH}": ""} if shared else {f"attn-{WIDTH}": "self_attention_", f"mlp-{WIDTH}": "feed_forward_"}
    for key, prefix in roles.items():
        for name, other in NAMES.items():
            pairs += links(
                network.generators[key].get_submodule(name), theirs.get_submodule(prefix + other), weight="weight", bias="bias"
            )
    return pairs


def _stacked(tasks: Any) -> Any:
    return lambda read: torch.stack([read(tasks.task_to_embeddings[task]) for task in TASKS])

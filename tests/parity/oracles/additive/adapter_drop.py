"""AdapterDrop beside AdapterHub, where its authors drop the adapters of the first layers."""

from __future__ import annotations

import abc
import itertools
import sys
import typing
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.activations import get_activation

from tests.parity.measure import Row, measure
from tests.parity.models import WIDTH, images, link, perturb_trained, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach
from veneer.methods.additive.bottleneck.adapter_drop import sample_layers, skip_layers

ORACLE = Repository("adapter-hub/adapters", "88f18ebd6c127f0e0ddf7c76cb84b37a39b82c12")
METHODS = ("adapter_drop",)
FOLDER, LAYERS, REDUCTION = "src/adapters/methods", 4, 4
CONFIG = {
    "ln_before": False, "ln_after": False, "adapter_residual_before_ln": False, "use_gating": False, "residual_before_ln": True,
    "original_ln_before": False, "original_ln_after": True, "phm_layer": False, "non_linearity": "relu", "scaling": 1.0,
    "dropout": 0.0, "init_weights": "bert", "init_weights_seed": None, "stochastic_depth": 0.0,
    "reduction_factor": REDUCTION, "is_parallel": False,
}  # fmt: skip
TEXT = "AdapterHub's example samples n from 0 to 10, the paper from 0 to 11; its default adapter reads the sum with the stream"


class Config(dict[str, Any]):
    """A configuration of AdapterHub: entries and attributes."""

    __getattr__ = dict.__getitem__


def rows() -> list[Row]:
    """Blocks of a ViT without the adapters below layer n, in training and in evaluation."""
    difference = max(_difference(n, training) for n in range(LAYERS) for training in (False, True))
    compared = "blocks of a ViT, adapters from layer n on: outputs, gradients"
    return [Row("adapter_drop", compared, difference, deviations=TEXT)]


class HubBlock(nn.Module):
    """A block of a ViT whose MLP is followed by a layer of AdapterHub."""

    def __init__(self, block: Any, layer: Any) -> None:
        super().__init__()
        self.block, self.layer = block, layer

    def forward(self, x: Tensor) -> Tensor:
        """The block; the layer adds the stream."""
        x = x + self.block.attn(self.block.norm1(x))
        out: Tensor = self.layer(self.block.mlp(self.block.norm2(x)), x, None)
        return out


def _difference(n: int, training: bool) -> float:
    code, stack = _code()
    model, theirs = vits(depth=LAYERS)
    setup = options(active_setup=stack("a"), skip_layers=list(range(n)), match=lambda name, **where: Config(CONFIG))
    layers = [code.BottleneckLayer("output_adapter") for _ in range(LAYERS)]
    for depth, layer in enumerate(layers):
        layer.init_adapters(options(hidden_size=WIDTH), setup)
        layer.add_adapter("a", depth)
    theirs.blocks = nn.Sequential(*(HubBlock(*pair) for pair in zip(theirs.blocks, layers, strict=True)))
    perturb_trained(theirs)
    tuned = attach(model, "adapter_drop", reduction=REDUCTION)
    for side in (model, theirs):
        side.train(training)
    if training:
        step = next(step for step in range(2, 1000) if sample_layers(0, step, LAYERS - 1) == n)
        tuned.after_step(step - 1, 1000)
    else:
        skip_layers(tuned, n)
    pairs: Any = []
    for depth in range(n, LAYERS):
        adapter, ours = layers[depth].adapters["a"], tuned.parts[f"blocks.{depth}.mlp.branch"][1]
        for side, linear in (("down", adapter.adapter_down[0]), ("up", adapter.adapter_up)):
            pairs += [(ours.get_parameter(side), link(linear.weight)), (ours.get_parameter(f"{side}_bias"), link(linear.bias))]
    difference = measure(lambda: model(images()), lambda: theirs(images()), pairs)
    assert all(p.grad is None for layer in layers[:n] for p in layer.parameters())
    assert sum(p.grad is not None for p in tuned.parameters()) == len(pairs)
    return difference


def _code() -> Any:
    """The bottleneck layer of AdapterHub, and the class of its stacks."""
    typed = {name: getattr(typing, name) for name in ("Dict", "List", "NamedTuple", "Optional", "Set", "Tuple", "Union")}
    typed |= {"Collection": Collection, "Mapping": Mapping, "Sequence": Sequence}
    composition = ORACLE.definitions("src/adapters/composition.py", itertools=itertools, sys=sys, warnings=warnings, **typed)
    context = options(get_context=lambda: None)
    names = {name: value for name, value in vars(composition).items() if not name.startswith("__")}
    names |= {"AdapterSetup": context, "ForwardContext": context, "ABCMeta": abc.ABCMeta, "abstractmethod": abc.abstractmethod}
    base = ORACLE.definitions(f"{FOLDER}/adapter_layer_base.py", "AdapterLayerBase", "ComposableAdapterLayerBase", **names)
    modeling = ORACLE.definitions(
        f"{FOLDER}/modeling.py", "Adapter", "Activation_Function_Class", get_activation=get_activation, BnConfig=dict,
        fix_seed=lambda seed: None,
    )  # fmt: skip
    code = ORACLE.definitions(
        f"{FOLDER}/bottleneck.py", "BottleneckLayer", "BottleneckState", BnConfig=dict, Adapter=modeling.Adapter,
        ComposableAdapterLayerBase=base.ComposableAdapterLayerBase, ParallelAdapter=None, **names,
    )  # fmt: skip
    return code, composition.Stack

"""Sites of all layers, norms and parameters of a model, in the order of its traced forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from veneer.injection.sites import FeatureSite, Port, Site

from .._describe import LAYERS, SAME_PADDED, TowerPart, is_norm, own_parameters
from .depths import depths, stages
from .meta_forward import MetaForward, model_classes, unique_modules
from .roles import CANCELLED_PARAMETERS, is_bias_cancelled, is_norm_bias_cancelled, parameter_role, weight_role

PLAIN_FORWARDS = ("Linear", *SAME_PADDED)  # timm's subclasses whose own forward computes the same
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)
NORM_NAMES = (
    "RmsNorm",
    "RmsNorm2d",
    "RmsNormFp32",
    "RmsNorm2dFp32",
    "SimpleNorm",
    "SimpleNorm2d",
    "SimpleNormFp32",
    "RmsNormAct2d",
)


def layer_sites(part: TowerPart, trace: MetaForward) -> Iterator[Site]:
    """The sites of every module with parameters, then those of the head's features and logits."""
    model = part.model
    modules = unique_modules(model)
    names = {path: [f"{path}.{name}".lstrip(".") for name in own_parameters(module)] for path, module in modules.items()}
    heads = classifiers(model, modules)
    outside = [path for path in names if any(_is_below(path, head) for head in heads)]
    depth_of = depths(model, [name for path, several in names.items() if path not in outside for name in several])
    stage_of = stages(model, len(set(depth_of.values())))
    for path in _in_order(modules, trace):
        module, role = modules[path], ""
        depth = next((depth_of[name] for name in names[path] if name in depth_of), None)
        if path in outside:
            role = "head"
        stage = next((label for prefix, label in stage_of.items() if depth is not None and _is_below(path, prefix)), None)
        inside = part.at(depth=depth, stage=stage)
        if isinstance(module, LAYERS):
            yield from _layer(inside, path, role, trace)
        elif not isinstance(module, nn.RNNBase):  # reads flat copies of its weights
            yield from _norm_or_parameters(inside, path, trace)
    yield from _features(part, heads, trace)


def classifiers(model: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the classifiers that timm names, of each list member by member; of a pooling head, the layer in it."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    several = list(head) if isinstance(head, (tuple, list, nn.ModuleList)) else [head]
    several = [getattr(one, "fc", one) if type(one).__name__.endswith("ClassifierHead") else one for one in several]
    heads = {id(one) for one in several if isinstance(one, nn.Module)}
    return [path for path, module in modules.items() if id(module) in heads]


def _in_order(modules: dict[str, nn.Module], trace: MetaForward) -> list[str]:
    """Paths in the order of the first calls; a module that is not called follows the one that contains it."""
    last: dict[str, int] = {}
    for path in modules:
        last[path] = trace.order.get(path, last.get(path.rpartition(".")[0], -1) if path else -1)
    return sorted(modules, key=lambda path: last[path])


def _is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")


def _layer(part: TowerPart, path: str, role: str, trace: MetaForward) -> Iterator[Site]:
    """A layer's weight, bias and further parameters. `role`: empty for one by its name and the modules around it.

    A weight that two modules hold has no site: an adapter of one would leave the other.
    """
    module, calls, uses = part.module(path), trace.calls[path], trace.uses
    if trace.owners[path, "weight"] > 1:
        return
    around = [part.module(".".join(path.split(".")[:end])) for end in range(1, path.count(".") + 2)]
    role = role or weight_role(path, around, part.depth)
    inert, inert_bias = (not uses[path, name] for name in ("weight", "bias"))
    inert_bias = inert_bias or is_bias_cancelled(path, role, around, part.model)
    called = calls > 0 and is_plain(module) and (inert or uses[path, "weight"] == calls)
    yield from part.layer(path, role, called=called, inert=inert, inert_bias=inert_bias)
    for name in own_parameters(module):
        if name not in ("weight", "bias"):
            yield part.parameter(path, name, parameter_role(name), inert=not uses[path, name])


def is_plain(layer: Any) -> bool:
    """True if calling the layer multiplies or convolves with its weight itself, not with a standardized or gathered one."""
    source = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    plain = source.__module__.startswith("torch.nn.") or source.__name__ in PLAIN_FORWARDS
    return plain and getattr(layer, "padding_mode", "zeros") == "zeros"


def _norm_or_parameters(part: TowerPart, path: str, trace: MetaForward) -> Iterator[Site]:
    """A norm, the weight and bias of a module that acts like one, or free parameters."""
    module, uses = part.module(path), trace.uses
    names = own_parameters(module)
    norm = is_norm(module) and "weight" in names
    role = "norm.qk" if path.rpartition(".")[2] in ("q_norm", "k_norm", "norm_q", "norm_k") else "norm"
    if norm and _scales_last(module):
        inert, inert_bias = not uses[path, "weight"], "bias" in names and not uses[path, "bias"]
        inert_bias = inert_bias or is_norm_bias_cancelled(path, part.model)
        yield from part.norm(path, role, called=trace.calls[path] > 0, inert=inert, inert_bias=inert_bias)
    if hasattr(module, "attention_bias_cache"):  # in evaluation mode, a change after the first pass would have no effect
        names = [name for name in names if name != "attention_biases"]
    for name in names:
        if norm and name in ("weight", "bias"):
            if not _scales_last(module):
                yield part.parameter(path, name, role if name == "weight" else f"bias.{role}", inert=not uses[path, name])
        elif getattr(module, name).numel():
            inert = not uses[path, name] or (type(module).__name__, name) in CANCELLED_PARAMETERS
            yield part.parameter(path, name, parameter_role(name), inert=inert)


def _scales_last(norm: Any) -> bool:
    """True for norms that end with a product with their weight, a vector, and the sum with their bias."""
    known = isinstance(norm, NORMS) or any(cls.__name__ in NORM_NAMES for cls in type(norm).__mro__)
    return known and norm.weight.dim() == 1


def _features(part: TowerPart, heads: list[str], trace: MetaForward) -> Iterator[Site]:
    """Pooled features and logits of each classifier of feature vectors; of others only the logits, as the model's output."""
    flat = [h for h in heads if trace.calls[h] == 1 and len(trace.inputs.get(h, ())) == len(trace.outputs.get(h, ())) == 2]
    for head in flat:
        classes = trace.outputs[head][-1] if model_classes(part.model) else 0
        read, fields = Port(head, "in"), {"width": trace.inputs[head][-1], "head": head, **part.labels}
        for role, port in (("features", read), ("logits", Port(head, "out"))):
            yield FeatureSite(name=f"{head}.{role}", role=role, port=port, read=read, classes=classes, **fields)
    if not flat and heads and model_classes(part.model) and len(trace.result or ()) == 2:
        classes = (trace.result or ())[-1]
        yield FeatureSite(
            name="logits", role="logits", port=Port("", "out"), width=classes, classes=classes, head=heads[0], **part.labels
        )

"""Checks of a host: compares its sites with the modules and with a traced forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.functional.convolve import convolve
from veneer.injection.attachment.probe import tensors
from veneer.injection.registry import hosts
from veneer.injection.sites import BranchSite, FeatureSite, NormSite, ParamSite, PixelSite, Site, VocabularySite, WeightSite

from .case import run, same
from .copies import cast_model, copy_module
from .roles import ROLES
from .trace import Trace, ports, width

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
KINDS: dict[str, tuple[type, ...]] = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "embedding": (nn.Embedding,),
}


def exactly_one_host_matches(traced: Trace) -> None:
    """The model matches this host and no other, apart from fallbacks."""
    others = [hosts.get(name) for name in hosts.names() if name != traced.host.name and not hosts.get(name).fallback]
    claims = [cls.name for cls in others if cls().matches(traced.model)]
    if claims:
        raise AssertionError(f"{type(traced.model).__name__} also matches {', '.join(claims)}")
    if not traced.host.matches(traced.model):
        raise AssertionError(f"{traced.host.name}: matches() rejects its own small model, a {type(traced.model).__name__}")
    if traced.host.matches(nn.Linear(1, 1)):
        raise AssertionError(f"{traced.host.name}: matches() accepts a plain nn.Linear")


def sites_resolve(traced: Trace) -> None:
    """There are sites, and each path, parameter, shape and geometry is that of the module. (Duplicate names fail earlier.)"""
    if not traced.sites:
        raise AssertionError(f"{traced.host.name}: it has no sites")
    for site in traced.sites:
        if isinstance(site, (WeightSite, ParamSite)):
            _resolve(traced.module(site), site)
        for owner, param, rows in _biases(site):
            if not isinstance(getattr(traced.model.get_submodule(owner), param, None), Tensor):
                raise AssertionError(f"{site.name}: no bias '{owner}.{param}'")
            size = len(getattr(traced.model.get_submodule(owner), param)) if rows is None else rows[1] - rows[0]
            if size != (site.d_out if isinstance(site, WeightSite) else getattr(site, "width", size)):
                raise AssertionError(f"{site.name}: the bias has {size} elements, which is not the number of outputs")


def called_is_true_by_tracing(traced: Trace) -> None:
    """A site is `called` if and only if its layer is called, and is a product with its weight, of the site's widths."""
    for site in traced.sites:
        if not isinstance(site, WeightSite):
            continue
        called = site.param == "weight" and (site.path, "out") in traced.order  # other parameters are read by their module
        called = called and is_product(traced.module(site), *traced.inputs[site.path])
        if called != site.called:
            does = "calls" if called else "does not call, or does not multiply by,"
            raise AssertionError(f"{site.name}: called={site.called}, but the host {does} it")
        if called:
            dim, module = (1 if site.kind == "conv" else -1), traced.module(site)
            x, y = traced.tensors[site.path, "in"], traced.tensors[site.path, "out"]
            rows = int(getattr(module, site.param).shape[1 if site.kind == "embedding" else 0])
            if y.shape[dim] != rows or (site.kind != "embedding" and x.shape[dim] != site.d_in):
                raise AssertionError(
                    f"{site.name}: maps {tuple(x.shape)} to {tuple(y.shape)}, but is described as {site.weight_shape}"
                )
            if site.kind == "conv":
                _convolves(module, site, x)


def called_bias_is_added_last(traced: Trace) -> None:
    """If a parameter site is `called`, a change of it changes the module's output equally along `channel_dim`."""
    for site in traced.sites:
        if not isinstance(site, ParamSite) or not site.called:
            continue
        module = traced.module(site)
        args, kwargs = traced.inputs[site.path]
        base: Tensor = getattr(module, site.param).detach()
        delta = torch.zeros_like(base)
        delta[slice(*site.rows) if site.rows else ...] = 1.0
        with torch.no_grad():
            before, after = (
                torch.func.functional_call(module, {site.param: value}, args, kwargs) for value in (base, base + delta)
            )
        shape = [1] * before.dim()
        shape[site.channel_dim] = -1
        fits = before.shape[site.channel_dim] == delta.numel()
        if not fits or not torch.allclose(after, before + delta.view(shape).to(before), atol=1e-6):
            raise AssertionError(f"{site.name}: called=True, but it is not added last along dimension {site.channel_dim}")


def called_norms_end_with_weight_and_bias(traced: Trace) -> None:
    """If a norm site is `called`, weight 0 and bias −1 give an output of −1, along `channel_dim`."""
    for site in traced.sites:
        if isinstance(site, NormSite) and site.called:
            module: Any = traced.module(site)
            args, kwargs = traced.inputs[site.path]
            values = {site.param: torch.zeros_like(getattr(module, site.param))}
            if site.bias:
                values["bias"] = torch.full_like(module.bias, -1.0)
            with torch.no_grad():
                got = torch.func.functional_call(module, values, args, kwargs)
            if getattr(module, site.param).shape != (site.width,) or got.shape[site.channel_dim] != site.width:
                raise AssertionError(f"{site.name}: width {site.width} differs from that of its weight or output")
            if not torch.equal(got, torch.full_like(got, -1.0 if site.bias else 0.0)):
                raise AssertionError(f"{site.name}: called=True, but the module does more after its weight and bias")


def ports_in_order(traced: Trace) -> None:
    """Each site is read before it is written, both occur in a forward pass, and the tensors have the site's width."""
    for site in traced.sites:
        found = ports(site)
        if found is not None:
            _in_order(traced, site, *found)
            if isinstance(site, BranchSite) and site.normed is not None:
                _in_order(traced, site, site.normed, site.write)
        elif isinstance(site, (PixelSite, FeatureSite)):
            if (site.port.path, site.port.side) not in traced.order:
                raise AssertionError(f"{site.name}: no tensor passes '{site.port.path}' ({site.port.side})")
        elif isinstance(site, VocabularySite) and not _enters(site, *traced.inputs[site.ids.path]):
            raise AssertionError(f"{site.name}: '{site.ids.path}' is not called with {site.argument}=… or with ids first")


def roles_are_canonical(traced: Trace) -> None:
    """Roles are those shared by all hosts; towers are named; depths count from 0."""
    for site in traced.sites:
        known = next((roles for kind, roles in ROLES.items() if isinstance(site, kind)), None)
        if known is not None and site.role not in known:
            raise AssertionError(
                f"{site.name}: the role '{site.role}' is not a role of {type(site).__name__}; use one of {sorted(known)}"
            )
    depths = sorted({site.depth for site in traced.sites if site.depth is not None})
    if depths != list(range(len(depths))):
        raise AssertionError(f"{traced.host.name}: depths are {depths}; expected consecutive block indices from 0")
    if not traced.host.tower:
        raise AssertionError(f"{traced.host.name}: the class has no tower")


def no_container_targets(traced: Trace) -> None:
    """No site targets a container, which would run or list an adapter as one of its modules."""
    for site in traced.sites:
        found = ports(site)
        paths = [p.path for p in found] if found else [getattr(site, "path", "")]
        for path in paths:
            if isinstance(traced.model.get_submodule(path), CONTAINERS):
                raise AssertionError(f"{site.name}: '{path}' is a {type(traced.model.get_submodule(path)).__name__}")


def inert_is_what_gradients_show(traced: Trace) -> None:
    """A site is `inert` if and only if its parameter gets no gradient, with the hooks of an attachment."""
    model = _copy(traced)
    traced.host.gradient_hooks(model)
    outputs = list(tensors(model(**traced.host.sample(model))))
    torch.stack([(y * torch.randn_like(y)).sum() for y in outputs]).sum().backward()
    for site in traced.sites:
        if isinstance(site, (WeightSite, ParamSite)):
            grad = getattr(model.get_submodule(site.path), site.param).grad
            size = 0.0 if grad is None else grad[slice(*site.rows) if site.rows else ...].abs().max().item()
            # Some softmaxes are computed in float32, which leaves noise where the true gradient is zero.
            if (size > 1e-6) if site.inert else (size < 1e-11):
                raise AssertionError(f"{site.name}: inert={site.inert}, but its largest gradient is {size}")


def sample_is_a_fixed_batch_of_two(traced: Trace) -> None:
    """`sample()` gives the same inputs every time, two rows, in the model's dtype, independent of torch's global generator."""
    state = torch.random.get_rng_state()
    first, second = traced.host.sample(traced.model), traced.host.sample(traced.model)
    if not torch.equal(torch.random.get_rng_state(), state):
        raise AssertionError(f"{traced.host.name}: sample() advances torch's global generator")
    for name, value in first.items():
        if isinstance(value, Tensor):
            same([second[name]], [value], f"{traced.host.name}: sample()['{name}'] called twice")
    outputs = run(traced.model, first)
    if len(outputs) != 2 and not any(t.dim() and t.shape[0] == 2 for t in outputs):  # some models return a list of rows
        raise AssertionError(
            f"{traced.host.name}: sample() gives outputs {[tuple(t.shape) for t in outputs]}; expected a batch of 2"
        )
    half = cast_model(traced.host, _copy(traced), torch.bfloat16)
    if not all(torch.isfinite(t).all() for t in run(half, traced.host.sample(half))):
        raise AssertionError(f"{traced.host.name}: sample() gives non-finite outputs in bfloat16")


def is_product(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """True if a layer's output is proportional to its weight, apart from the bias; false for standardized weights."""
    if type(module).__module__.startswith("torch.nn.modules."):
        return True
    weight: Any = module.weight
    shift = getattr(module, "bias", None)
    bias = {"bias": torch.zeros_like(shift)} if isinstance(shift, Tensor) else {}
    with torch.no_grad():
        once, twice = (torch.func.functional_call(module, {"weight": w, **bias}, args, kwargs) for w in (weight, 2 * weight))
    return torch.allclose(twice, 2 * once)


def _resolve(module: nn.Module, site: Any) -> None:
    parameter = getattr(module, site.param, None)
    if not isinstance(parameter, nn.Parameter):
        raise AssertionError(f"{site.name}: '{site.path}' has no parameter '{site.param}'")
    shape = list(parameter.shape)
    if site.rows is not None:
        shape[0] = site.rows[1] - site.rows[0]
    described = site.weight_shape if isinstance(site, WeightSite) else site.shape
    if tuple(shape) != tuple(described) or (site.rows and not 0 <= site.rows[0] < site.rows[1] <= parameter.shape[0]):
        raise AssertionError(
            f"{site.name}: described as {tuple(described)}, rows {site.rows}; the tensor is {tuple(parameter.shape)}"
        )
    if isinstance(site, WeightSite):
        if site.param == "weight" and not isinstance(module, KINDS[site.kind]):
            raise AssertionError(f"{site.name}: kind '{site.kind}', but the module is a {type(module).__name__}")
        layer: Any = module
        if site.kind == "conv":
            geometry = (layer.kernel_size, layer.stride, layer.dilation, layer.groups)
            if geometry != (site.kernel, site.stride, site.dilation, site.groups):
                raise AssertionError(f"{site.name}: geometry differs from the module's {geometry}")
    elif math.prod(site.shape) == 0:
        raise AssertionError(f"{site.name}: the parameter is empty")


def _biases(site: Site) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
    """(module, parameter, rows) of the bias of a site's weight, if it has one."""
    if isinstance(site, (WeightSite, NormSite)) and site.bias:
        owner, _, param = site.bias.rpartition(".")
        yield owner, param, getattr(site, "bias_rows", None)


def _enters(site: VocabularySite, args: Any, kwargs: Any) -> bool:
    ids = kwargs.get(site.argument, args[0] if args else None)
    return isinstance(ids, Tensor) and not ids.is_floating_point()


def _convolves(module: Any, site: WeightSite, x: Tensor) -> None:
    """Asserts that the module computes a convolution with the site's geometry; some modules pad differently."""
    with torch.no_grad():
        weight, bias = getattr(module, site.param), getattr(module, "bias", None)
        got = convolve(x, weight, site.stride, site.padding, site.dilation, site.groups)
        got = got if bias is None else got + bias.view(-1, *(1 for _ in site.kernel))
        expected = module(x)
    if got.shape != expected.shape or not torch.allclose(got, expected):
        raise AssertionError(f"{site.name}: padding {site.padding!r} gives other outputs than the module")


def _in_order(traced: Trace, site: Site, read: Any, write: Any) -> None:
    for port in (read, write):
        if (port.path, port.side) not in traced.order:
            raise AssertionError(f"{site.name}: no tensor passes '{port.path}' ({port.side})")
        got = width(traced.tensors[port.path, port.side], getattr(site, "layout", "NLC"))
        declared = getattr(site, "width", got) if port is not read else getattr(site, "d_in", 0) or getattr(site, "width", got)
        if got != declared:
            raise AssertionError(f"{site.name}: width {declared}, but {got} at '{port.path}' ({port.side})")
    if not traced.order[read.path, read.side] < traced.order[write.path, write.side]:
        raise AssertionError(f"{site.name}: '{write.path}' ({write.side}) comes before '{read.path}' ({read.side})")


def _copy(traced: Trace) -> nn.Module:
    return copy_module(traced.model).requires_grad_(True)


CHECKS = (
    exactly_one_host_matches,
    sites_resolve,
    called_is_true_by_tracing,
    called_bias_is_added_last,
    called_norms_end_with_weight_and_bias,
    ports_in_order,
    roles_are_canonical,
    no_container_targets,
    inert_is_what_gradients_show,
    sample_is_a_fixed_batch_of_two,
)

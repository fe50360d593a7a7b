"""Traces one forward pass of a host's small model: which modules run, in which order, with which tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection.host import Host
from veneer.injection.sites import BranchSite, Port, Site, StreamSite, TokenSite

from .case import build_model, fresh_model, sites_of
from .copies import cast_model

PortKey = tuple[str, str]


@dataclass(frozen=True)
class Trace:
    """A bare model with its sites and one traced forward pass.

    Args:
        order: (path, `in` or `out`) -> index of the event when it first occurs.
        tensors: first argument or output at that event. `inputs`: all arguments.
    """

    host: Host
    model: nn.Module
    sites: tuple[Site, ...]
    order: dict[PortKey, int]
    tensors: dict[PortKey, Any]
    inputs: dict[str, tuple[Any, Any]]

    def module(self, site: Any) -> nn.Module:
        """The module at a site's path."""
        found: nn.Module = self.model.get_submodule(site.path)
        return found


@functools.cache
def trace(host: type[Host], model: str) -> Trace:
    """Traces one forward pass of a small model, in float64, on the host's sample. The result is cached: do not modify it."""
    built = cast_model(host(), fresh_model(host(), model), torch.float64)
    order: dict[PortKey, int] = {}
    tensors: dict[PortKey, Any] = {}
    inputs: dict[str, tuple[Any, Any]] = {}

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        order.setdefault((path, "in"), len(order))
        inputs.setdefault(path, (args, kwargs))
        tensors.setdefault((path, "in"), args[0] if args else next(iter(kwargs.values()), None))

    def after(path: str, module: nn.Module, args: Any, output: Any) -> None:
        order.setdefault((path, "out"), len(order))
        tensors.setdefault((path, "out"), output[0] if isinstance(output, tuple) else output)

    handles = []
    for path, module in built.named_modules():
        handles.append(module.register_forward_pre_hook(functools.partial(before, path), with_kwargs=True))
        handles.append(module.register_forward_hook(functools.partial(after, path)))
    with torch.no_grad():
        built(**host().sample(built))
    for handle in handles:
        handle.remove()
    return Trace(host(), built, sites_of(host, model), order, tensors, inputs)


def ports(site: Site) -> tuple[Port, Port] | None:
    """The ports where a site is read and written, if it lies between two ports."""
    if isinstance(site, BranchSite):
        return site.read, site.write
    if isinstance(site, StreamSite):
        return Port(site.path, "in"), Port(site.path, "out")
    return (site.enter, site.leave) if isinstance(site, TokenSite) else None


def width(tensor: Tensor, layout: str) -> int:
    """The number of channels of a tensor."""
    return tensor.shape[1 if layout == "NCHW" else -1]


def forget_models() -> None:
    """Clears the cached small models and traces, after a record or host was replaced by another of the same name."""
    for cached in (build_model, sites_of, trace):
        cached.cache_clear()

"""Checks which adapters can be attached to quantized weights: those that act in calls of a layer, not in its weight."""

from __future__ import annotations

import torch

from ..errors import UnsupportedSite
from ..method import Method
from ..quantized_weight import is_quantized
from ..registry import methods
from ..seams.adapter_calls import base_tensor
from ..seams.seam_choice import acts_in_calls
from ..sites import NormSite, ParamSite, Site, WeightSite
from .plan import Plan, supports


def reject_weight_forms(planned: Plan) -> None:
    """Checks that no adapter would parametrize a quantized weight.

    Raises:
        UnsupportedSite: with the site, and in `expected` the names of the methods that work there.
    """
    method = planned.method
    for site, adapter in planned.parts:
        if isinstance(site, (WeightSite, ParamSite, NormSite)) and not acts_in_calls(site, adapter):
            tensor = base_tensor(planned.towers[site.component], site.path, site.param)
            if is_quantized(tensor):
                raise weight_form_error(site, method, type(tensor).__name__)


def weight_form_error(site: Site, method: Method, kind: str) -> UnsupportedSite:
    """The error for a method that computes the weight at a site, which is quantized as `kind`."""
    supported = methods_on_quantized(site)
    return UnsupportedSite(
        f"{site.name}: {method.name} with these options computes a new weight, and this one is quantized ({kind}). "
        f"Methods that work on it: {', '.join(supported) or 'none'}. Or load the base model unquantized.",
        site=site.name,
        method=method.name,
        given=kind,
        expected=supported,
    )


def reject_trained(planned: Plan) -> None:
    """Checks that no base parameter in `train` is quantized.

    Raises:
        UnsupportedSite: with the name of the parameter.
    """
    for component, path in planned.extras.values():
        owner, _, param = path.rpartition(".")
        tensor = base_tensor(planned.towers[component], owner, param)
        if is_quantized(tensor):
            name = ".".join(filter(None, (component, path)))
            raise UnsupportedSite(
                f"{name}: train={planned.train!r} trains this base weight, but it is quantized ({type(tensor).__name__}) "
                "and has no gradient. Train other weights, or load the base model unquantized.",
                site=name,
                option="train",
                given=type(tensor).__name__,
                expected="a float weight",
            )


def methods_on_quantized(site: Site) -> tuple[str, ...]:
    """Names of the methods, with the first of their example configs, whose adapters act in calls at a site."""
    return tuple(name for name in methods.names() if _acts_in_calls(methods.get(name), site))


def _acts_in_calls(method: type[Method], site: Site) -> bool:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            config = next(iter(method.examples()))
            return supports(config, site) and acts_in_calls(site, config.build(site))
        except (ValueError, ImportError, StopIteration, NotImplementedError):
            return False

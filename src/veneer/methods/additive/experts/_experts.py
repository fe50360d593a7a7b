"""Stacks of experts: one is sampled for each training pass and site, their average is used otherwise."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from veneer.injection.errors import OptionError, StateError
from veneer.injection.method import Adapter, Method
from veneer.injection.sites import Site
from veneer.injection.training_protocol import Distance


class ExpertAdapter(Adapter):
    """Base of adapters whose matrices are stacks of experts, (experts, …), or (1, …) if all experts share one.

    Attributes:
        route: buffer (2,), int64: the expert of the down and of the up projection in the current training pass, or None.
    """

    route: Tensor | None

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.site = site
        self.register_buffer("route", None, persistent=False)

    def expert(self, stack: Tensor, side: int) -> Tensor:
        """The sampled expert of a stack in training, else the average.

        Args:
            side: 0 for the down, 1 for the up projection.
        Raises:
            StateError: no expert was sampled for this training pass.
        """
        if stack.shape[0] == 1:
            return stack[0]
        if not self.training:
            return stack.mean(0)
        if self.route is None:
            message = (
                f"{self.site.name}: a training pass without sampled experts. Call attachment.begin_pass(seed, step, number) "
                "before each forward pass, or model.eval() to use their average."
            )
            raise StateError(message, where=self.site.name, given="training", expected="begin_pass")
        return stack.index_select(0, self.route[side : side + 1])[0]


def sample_expert(experts: int, seed: int, step: int, number: int, site: str, side: int) -> int:
    """Index of an expert, uniform: a hash of the arguments, so that it is the same on every process and after a resume.

    Args:
        experts: their number. `number`: of the pass in its step. `side`: 0 for the down, 1 for the up projection.
    """
    text = f"{seed}/{step}/{number}/{side}/{site}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % experts


def sample_experts(adapters: Iterable[tuple[Site, Any]], experts: Mapping[str, int], seed: int, step: int, number: int) -> None:
    """Samples the experts of a training pass at all sites; one copy to each device.

    Args:
        experts: their number by name of the site.
    """
    parts = [(site, adapter) for site, adapter in adapters if isinstance(adapter, ExpertAdapter)]
    routes = [[sample_expert(experts[site.name], seed, step, number, site.name, side) for side in (0, 1)] for site, _ in parts]
    devices = [next(adapter.parameters()).device for _, adapter in parts]
    table = torch.tensor(routes, dtype=torch.int64)
    tables = {device: table.to(device) for device in dict.fromkeys(devices)}
    for row, ((_, adapter), device) in enumerate(zip(parts, devices, strict=True)):
        adapter.route = tables[device][row]


@torch.no_grad()
def average_experts(adapters: Iterable[tuple[Site, Any]]) -> None:
    """Replaces each stack of experts by their average, (1, …)."""
    for _, adapter in adapters:
        for name, parameter in list(adapter.named_parameters(recurse=False)):
            if parameter.shape[0] > 1:
                setattr(adapter, name, nn.Parameter(parameter.mean(0, keepdim=True)))


def stack_of(matrix: Tensor, experts: int) -> nn.Parameter:
    """Equal copies of a matrix, (experts, …)."""
    return nn.Parameter(matrix.detach().unsqueeze(0).repeat(experts, *(1,) * matrix.ndim))


class ExpertMethod(Method):
    """Base of methods with several experts at a site, whose subclasses have these options as fields."""

    experts: int
    share_down: bool
    share_up: bool
    consistency: float

    def check_expert_options(self) -> None:
        """Raises `OptionError` for no experts or a negative weight of the consistency loss."""
        if self.experts < 1:
            raise OptionError.of(self.name, "experts", self.experts, "at least 1")
        if self.consistency < 0:
            raise OptionError.of(self.name, "consistency", self.consistency, "at least 0")

    @property
    def passes(self) -> int:
        """2 with a consistency loss, if a site has several experts; else 1."""
        several = self.experts > 1 or any(options.get("experts", 1) > 1 for options in self.by_site.values())
        return 2 if self.consistency and several else 1

    def begin_pass(self, adapters: Iterable[tuple[Site, Any]], seed: int, step: int, number: int) -> None:
        """Samples the experts of every site."""
        parts = list(adapters)
        sample_experts(parts, {site.name: cast(Self, self.at(site)).experts for site, _ in parts}, seed, step, number)

    def consistency_loss(self, outputs: Sequence[Tensor], distance: Distance) -> Tensor:
        """The weighted distance of the two passes, (batch,)."""
        return self.consistency * distance(outputs[0], outputs[1])

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Averages the experts of every site. Returns the config with one expert."""
        average_experts(adapters)
        rest = {pattern: {k: v for k, v in options.items() if k != "experts"} for pattern, options in self.by_site.items()}
        options: dict[str, Any] = {"experts": 1, "by_site": {pattern: left for pattern, left in rest.items() if left}}
        return dataclasses.replace(self, **options)

    def stacks(self) -> tuple[int, int]:
        """Numbers of down and up projections."""
        return 1 if self.share_down else self.experts, 1 if self.share_up else self.experts

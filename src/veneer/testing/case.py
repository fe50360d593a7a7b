"""The subject of a check: a method on a small model of a host, with fresh copies, inputs, outputs and comparisons."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment, attach
from veneer.injection.adapter_forms import (
    BiasAdapter,
    ImagePromptAdapter,
    LayeredVocabularyAdapter,
    TokenAdapter,
    WeightAdapter,
)
from veneer.injection.attachment.condition_scope import example_conditions
from veneer.injection.attachment.plan import supports
from veneer.injection.attachment.probe import tensors
from veneer.injection.host import Host
from veneer.injection.method import Method
from veneer.injection.multimodal_prompt_site import MultimodalPromptSite
from veneer.injection.quantized_weight import is_quantized
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import Site, StreamSite, TokenSite, VocabularySite
from veneer.injection.towers import Tower

from .copies import cast_model, copy_module
from .records import Skip


@functools.cache
def build_model(host: type[Host], model: str) -> nn.Module:
    """A small model in evaluation mode, seeded, with all parameters perturbed, because zeros hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = host().tiny()[model]().eval()
        with torch.no_grad():
            for p in built.parameters():
                if not is_quantized(p):
                    p.add_(torch.randn_like(p), alpha=0.05)
    return built


def fresh_model(host: Host, model: str) -> nn.Module:
    """A new copy of a small model."""
    return copy_module(build_model(type(host), model))


@functools.cache
def sites_of(host: type[Host], model: str) -> tuple[Site, ...]:
    """The sites of a small model without attachments."""
    return Tower("", build_model(host, model), host(), True).sites


def is_supported(method: Method, host: Host, model: str) -> bool:
    """True if the method builds an adapter for a site of a small model. Stops at the first one. Raises as `usable_sites`."""
    with torch.random.fork_rng(devices=[]):
        return next(_buildable(method, sites_of(type(host), model)), None) is not None


_USABLE: dict[tuple[type[Method], str, type[Host], str], tuple[Site, ...]] = {}


def usable_sites(method: Method, host: Host, model: str) -> tuple[Site, ...]:
    """The sites of a small model that the method builds an adapter for, without fused weights whose slices are sites. Cached.

    Raises:
        ValueError: the method rejects every site that matches its needs; the error is that of the last site.
    """
    key = type(method), repr(method), type(host), model
    if key not in _USABLE:
        with torch.random.fork_rng(devices=[]):
            _USABLE[key] = tuple(_buildable(method, sites_of(type(host), model)))
    return _USABLE[key]


def _buildable(method: Method, sites: Iterable[Site]) -> Iterator[Site]:
    accepts, rejection = False, None
    for site in sites:
        if supports(method, site) and not getattr(site, "fused", False):
            try:
                method.build(site)
            except ValueError as error:
                rejection = error
            else:
                accepts = True
                yield site
    if rejection and not accepts:
        raise rejection


@dataclass(frozen=True)
class Case:
    """A method on a small model, at every site that it supports.

    Args:
        method: the config. `host`, `model`: the small model. `sites`: the adapted sites.
        other: another config of the method, for checks with two attachments.
    """

    method: Method
    host: Host
    model: str
    sites: tuple[Site, ...]
    other: Method

    def fresh(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new copy of the bare model."""
        return cast_model(self.host, fresh_model(self.host, self.model), dtype)

    def bare(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A frozen copy of the bare model, like an attached one: attention may choose its kernel by `requires_grad`."""
        return self.fresh(dtype).requires_grad_(False)

    def attach(self, model: nn.Module, method: Method | None = None, seed: int = 0, **options: Any) -> Attachment:
        """Attaches at every usable site, with a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            attachment = attach(model, method or self.method, **{"where": self.where, **options})
            add_conditions(attachment, self.plain(model))
            if attachment.method.selects:
                attachment.select(loss(model, self.inputs(model, attachment)) for _ in range(2))
        attachment.begin_pass(seed, 0)  # training passes of the checks have sampled values, as in a trainer
        return attachment

    def attached(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Attachment]:
        """A new copy with perturbed adapters."""
        model = self.fresh(dtype)
        attachment = self.attach(model)
        perturb(attachment)
        return model, attachment

    @property
    def where(self) -> tuple[str, ...]:
        """The selection of exactly `sites`."""
        return tuple(f"name:{site.name}" for site in self.sites)

    @property
    def switches(self) -> bool:
        """True if the adapters can only be on or off, such as inserted tokens, or change the shape of the output."""
        forms = (TokenAdapter, ImagePromptAdapter, LayeredVocabularyAdapter)
        changed = [site for site in self.sites if isinstance(site, (StreamSite, MultimodalPromptSite, VocabularySite))]
        changes = any(isinstance(self.method.at(site).build(site), forms) for site in changed)
        return changes or any(isinstance(site, TokenSite) for site in self.sites)

    def merging(self) -> None:
        """Raises `Skip` if the adapters have no weight form, or the weights are quantized."""
        for site in self.sites:
            if not merges_at(site, self.method.build(site)):
                raise Skip(f"{self.method.name} has no weight form at {site.name}")
            if self.is_quantized_at(site):
                raise Skip(f"{site.name} is quantized, and merging is lossy there")

    def is_quantized_at(self, site: Any) -> bool:
        """True if the weight of a site is quantized."""
        model = build_model(type(self.host), self.model)
        return is_quantized(base_tensor(model, site.path, site.param))

    def plain(self, model: nn.Module) -> dict[str, Any]:
        """Inputs for the bare host."""
        return self.host.sample(model)

    def inputs(self, model: nn.Module, *attachments: Attachment) -> dict[str, Any]:
        """Inputs that exercise the adapters."""
        inputs = self.plain(model)
        for attachment in attachments:
            add_conditions(attachment, inputs)
            for _, adapter in attachment.parts.values():
                amend = getattr(adapter, "sample", None)
                inputs = amend(inputs) if amend else inputs
        return inputs


def add_conditions(attachment: Attachment, inputs: dict[str, Any]) -> Attachment:
    """The attachment, with example conditions for the inputs if its method needs conditions."""
    if attachment.method.conditions and attachment.conditions is None:
        attachment.conditions = example_conditions(attachment, inputs)
    return attachment


def merges_at(site: Any, adapter: Any) -> bool:
    """True if the adapter has a weight form at the site, and the site has a bias for its shift, if it has one."""
    return isinstance(adapter, WeightAdapter) and (not isinstance(adapter, BiasAdapter) or bool(site.bias))


def perturb(attachment: Attachment, seed: int = 1, size: float = 0.05) -> None:
    """Perturbs every trainable parameter, with a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in attachment.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=size)


def run(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """The model's floating-point outputs, without a graph."""
    with torch.no_grad():
        return [t.clone() for t in tensors(model(**inputs))]


def loss(model: Any, inputs: dict[str, Any]) -> Tensor:
    """A scalar that depends on every output element, with different weights."""
    outputs = [t.float() for t in tensors(model(**inputs))]
    generator = torch.Generator().manual_seed(2)
    return torch.stack([(t * torch.randn(t.shape, generator=generator).to(t.device)).mean() for t in outputs]).sum()


def training_loss(model: nn.Module, attachment: Attachment, inputs: dict[str, Any]) -> Tensor:
    """`loss`, with the penalty of adapters whose parameters have no gradient without it."""
    choosing = [adapter for _, adapter in attachment.parts.values() if adapter.chooses]
    for adapter in choosing:
        adapter.train()
    value = loss(model, inputs)
    penalty = attachment.penalty() if choosing else None
    for adapter in choosing:
        adapter.train(model.training)
    return value if penalty is None else value + penalty


def same(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Asserts bitwise equality; the `AssertionError` states the largest difference."""
    if not equal(got, expected):
        raise AssertionError(f"{what}: expected bitwise equality, largest difference {_distance(got, expected)}")


def different(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Asserts that tensors are not bitwise equal."""
    if equal(got, expected):
        raise AssertionError(f"{what}: expected a different output, got the same")


def equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """True if all tensors are equal."""
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def close(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str) -> None:
    """Asserts that the largest difference is at most `tolerance` times the largest value (or 1)."""
    scale = max([1.0, *(t.abs().max().item() for t in expected if t.numel())])
    off = _distance(got, expected)
    if not off <= tolerance * scale:
        raise AssertionError(f"{what}: largest difference {off}, allowed {tolerance * scale}")


def _distance(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    shapes = [tuple(t.shape) for t in got], [tuple(t.shape) for t in expected]
    if shapes[0] != shapes[1]:
        raise AssertionError(f"shapes {shapes[0]}, expected {shapes[1]}")
    return max([0.0, *((a - b).abs().max().item() for a, b in zip(got, expected, strict=True) if a.numel())])

"""Find dead sites: adapters that are attached and never used, the field's costliest silent bug."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeadSite, StateError
from ..registry import host_of
from .condition_scope import condition_scope, example
from .protocol import AttachmentProtocol


def probe(attachment: AttachmentProtocol, sample: Any = None) -> None:
    """One forward and one backward pass per tower, with the adapters' parameters moved off their start values.

    Sites that the host declares inert are passed over; the report counts them.

    Moving them matters: with LoRA's B = 0, A has no gradient and the output does not change, although both are alive.
    Everything is put back: parameters, modes, random state.

    Raises:
        DeadSite: naming each site and parameter that no output depends on.
        StateError: the adapters are merged or switched off.
    """
    if attachment.merged or not attachment.is_enabled or attachment.scale == 0:
        state = "merged" if attachment.merged else "disabled" if not attachment.is_enabled else "scale 0"
        raise StateError(
            f"'{attachment.name}' is merged, off or at scale 0; a probe needs it on.",
            where=attachment.name,
            given=state,
            expected="enabled",
        )
    dead = [name for component, tower in attachment.towers.items() for name in _dead(attachment, component, tower, sample)]
    if dead:
        more = f" and {len(dead) - 10} more" if len(dead) > 10 else ""
        raise DeadSite(
            f"'{attachment.name}' ({attachment.method.name}): no output depends on {', '.join(dead[:10])}{more}. "
            "The host reads past these modules; select other sites.",
            where=attachment.name,
            given=tuple(dead),
        )


def _dead(attachment: AttachmentProtocol, component: str, tower: nn.Module, sample: Any) -> Iterator[str]:
    adapters = {n: a for n, (s, a) in attachment.parts.items() if s.component == component and not s.inert}
    named = [(f"{n}:{k}", p) for n, a in adapters.items() for k, p in a.named_parameters() if p.requires_grad]
    if not named:
        return
    inputs = _inputs(tower, component, sample)
    for adapter in adapters.values():
        amend = getattr(adapter, "sample", None)
        inputs = amend(inputs) if amend else inputs
    conditions = (
        condition_scope(attachment, example(attachment, inputs)) if attachment.method.conditions else contextlib.nullcontext()
    )
    parameters = [p for _, p in named]
    before = [p.detach().clone() for p in parameters]
    devices = [p.device for p in parameters[:1] if p.device.type == "cuda"]
    try:
        with conditions, eval_mode(tower), torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(0)
            with torch.no_grad():
                for p in parameters:
                    p.add_(torch.randn_like(p), alpha=0.02)
            total = sum(((t.float() * torch.randn_like(t.float())).sum() for t in tensors(tower(**inputs))), torch.zeros(()))
            if not total.requires_grad:
                yield from (name for name, _ in named)
                return
            grads = torch.autograd.grad(total, parameters, allow_unused=True)
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
    for (name, p), grad in zip(named, grads, strict=True):
        if grad is None or (p.device.type != "meta" and not grad.abs().sum().item() > 0):
            yield name


@contextlib.contextmanager
def eval_mode(tower: nn.Module) -> Iterator[None]:
    """Evaluation mode; the mode of every module is restored at the end."""
    modes = {m: m.training for m in tower.modules()}
    tower.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _inputs(tower: nn.Module, component: str, sample: Any) -> dict[str, Any]:
    if isinstance(sample, Mapping) and component in sample:
        sample = sample[component]
    if sample is None:
        host = host_of(tower)
        assert host is not None
        return host.sample(tower)
    return dict(sample)


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a model's output, whatever its container."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)
    elif hasattr(output, "__dict__"):
        yield from tensors(vars(output))

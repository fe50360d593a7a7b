"""Finds dead sites: adapters that are attached, but that no output of the model depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeadSite, StateError
from ..registry import host_of
from .condition_scope import condition_scope, example_conditions
from .gradient_flow import check_gradient_flow
from .protocol import AttachmentProtocol


def probe(attachment: AttachmentProtocol, sample: Any = None) -> None:
    """Runs one forward and one backward pass per tower, with noise added to the adapters' parameters.

    The noise is needed because of zero initializations: with LoRA's B = 0, A has no gradient and the output does not change,
    although both are used. Of adapters with `chooses`, the penalty is differentiated besides. Parameters, training modes and the
    random state are restored. Inert sites (`Site.inert`) are skipped; the report counts them.

    Raises:
        DeadSite: no output depends on some parameters; has their names.
        BlockedGradient: a layer of the host stops gradients; names it.
        StateError: the adapters are merged, disabled or at scale 0.
    """
    if attachment.merged or not attachment.is_enabled or attachment.scale == 0:
        state = "merged" if attachment.merged else "disabled" if not attachment.is_enabled else "scale 0"
        raise StateError(
            f"'{attachment.name}': probe needs enabled adapters, got {state}. Unmerge or enable it, or set its scale.",
            where=attachment.name,
            given=state,
            expected="enabled",
        )
    dead = [
        name for component, tower in attachment.towers.items() for name in _dead_parameters(attachment, component, tower, sample)
    ]
    if dead:
        more = f" and {len(dead) - 10} more" if len(dead) > 10 else ""
        raise DeadSite(
            f"'{attachment.name}' ({attachment.method.name}): no output depends on {', '.join(dead[:10])}{more}. "
            "The model does not use these parameters; select other sites.",
            where=attachment.name,
            given=tuple(dead),
        )


def _dead_parameters(attachment: AttachmentProtocol, component: str, tower: nn.Module, sample: Any) -> Iterator[str]:
    """Names of the adapter parameters of one tower that its output does not depend on."""
    adapters = {n: a for n, (s, a) in attachment.parts.items() if s.component == component and not s.inert}
    named = [(f"{n}:{k}", p) for n, a in adapters.items() for k, p in a.named_parameters() if p.requires_grad]
    if not named:
        return
    inputs = _sample_inputs(tower, component, sample)
    for adapter in adapters.values():
        adjust = getattr(adapter, "sample", None)
        inputs = adjust(inputs) if adjust else inputs
    conditions = (
        condition_scope(attachment, example_conditions(attachment, inputs))
        if attachment.method.conditions
        else contextlib.nullcontext()
    )
    parameters = [p for _, p in named]
    original = [p.detach().clone() for p in parameters]
    devices = [p.device for p in parameters[:1] if p.device.type == "cuda"]
    try:
        with conditions, eval_mode(tower), torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(0)
            for adapter in adapters.values():
                adapter.train(adapter.chooses)  # which has a penalty in training mode only
            with torch.no_grad():
                for p in parameters:
                    p.add_(torch.randn_like(p), alpha=0.02)
            with check_gradient_flow([tower]):
                outputs = list(tensors(tower(**_with_gradients(inputs))))
            loss = sum(((t.float() * torch.randn_like(t.float())).sum() for t in outputs), torch.zeros(()))
            if any(adapter.chooses for adapter in adapters.values()) and (penalty := attachment.penalty()) is not None:
                loss = loss + penalty
            if not loss.requires_grad:
                yield from (name for name, _ in named)
                return
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, original, strict=True):
                p.copy_(value)
    for (name, p), grad in zip(named, grads, strict=True):
        if grad is None or (p.device.type != "meta" and not grad.abs().sum().item() > 0):
            yield name


def _with_gradients(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, floating-point tensors among them with gradients, so that every layer sees one."""
    return {
        key: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


@contextlib.contextmanager
def eval_mode(tower: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; restores the training mode of every module."""
    modes = {m: m.training for m in tower.modules()}
    tower.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _sample_inputs(tower: nn.Module, component: str, sample: Any) -> dict[str, Any]:
    if isinstance(sample, Mapping) and component in sample:
        sample = sample[component]
    if sample is None:
        host = host_of(tower)
        assert host is not None
        return host.sample(tower)
    return dict(sample)


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a model's output, in any nesting of containers."""
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

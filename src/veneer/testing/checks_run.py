"""Checks of a method in use: batches, half precision, gradient checkpointing, compilation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.injection.attachment.attachment import Attachment
from veneer.injection.sites import Site

from .case import Case, close, different, run, same, training_loss
from .records import Skip

SWITCHES = (
    "enable_gradient_checkpointing",
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
    "set_grad_checkpointing",
)
"""Names of the method that enables gradient checkpointing: diffusers, transformers (since 5, and before), timm."""


def batch_rows_are_independent(case: Case) -> None:
    """Another second batch row does not change the first row's output."""
    model, attachment = case.attached(torch.float64)
    inputs = case.inputs(model, attachment)
    other = {key: _repeat_first(value) for key, value in inputs.items()}
    got, expected = run(model, other), run(model, inputs)
    different(got, expected, f"{case.method.name}: with another second row")
    close(_first_row(got), _first_row(expected), 1e-9, f"{case.method.name}: the first row's output with another second row")


def calls_are_independent(case: Case) -> None:
    """The same input gives bitwise the same output after a forward pass with another one."""
    model, attachment = case.attached()
    inputs = case.inputs(model, attachment)
    expected = run(model, inputs)
    run(model, {key: _repeat_first(value) for key, value in inputs.items()})
    same(run(model, inputs), expected, f"{case.method.name}: after a forward pass with another input")


def half_precision(case: Case) -> None:
    """On a bfloat16 host: bfloat16 outputs, float32 adapters, finite gradients; disabled, it equals the host."""
    bare, (model, attachment) = case.bare(torch.bfloat16), case.attached(torch.bfloat16)
    _check_half_precision(case, bare, model, attachment)


def autocast(case: Case) -> None:
    """As `half_precision`, under autocast on a float32 host."""
    bare, (model, attachment) = case.bare(), case.attached()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # from the host's own norms
        _check_half_precision(case, bare, model, attachment)


def checkpointing_gives_the_same_gradients(case: Case) -> None:
    """Gradients with the host's gradient checkpointing equal those without it."""
    model, attachment = case.attached()
    model.train()
    expected = _gradients(case, model, attachment)
    switch: Any = next((getattr(model, name) for name in SWITCHES if hasattr(model, name)), None)
    if switch is None or getattr(model, "_supports_gradient_checkpointing", True) is False:
        raise Skip(f"{case.host.name} has no gradient checkpointing")
    is_diffusers = hasattr(model, SWITCHES[0])  # whose own function takes no keyword arguments, which some blocks have
    switch(*([functools.partial(checkpoint, use_reentrant=False)] if is_diffusers else []))
    got = _gradients(case, model, attachment)
    for name, gradient in expected.items():
        close([got[name]], [gradient], 1e-6, f"{name}: its gradient with checkpointing against without")


def compiles_to_one_graph(case: Case) -> None:
    """Adapted at one site of each kind, the model compiles to one graph, same outputs; scale and switch do not recompile."""
    one_graph(one_of_each(case))


def one_graph(case: Case) -> None:
    """`compiles_to_one_graph` at every site of a case."""
    model, attachment = case.attached()
    inputs = case.inputs(model, attachment)
    expected = run(model, inputs)
    with _compiler():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        try:
            got = run(compiled, inputs)
        except Exception as error:
            _skip_if_host_breaks_graph(case, error)
            raise
        close(got, expected, 1e-5, f"{case.method.name}: compiled against eager")
        if case.switches:
            return
        with torch._dynamo.config.patch(error_on_recompile=True):
            attachment.scale = 0.5
            close(run(compiled, inputs), run(model, inputs), 1e-5, f"{case.method.name}: compiled, at scale 0.5")
            with attachment.enabled(False):
                close(run(compiled, inputs), run(model, inputs), 1e-5, f"{case.method.name}: compiled, disabled")


def one_of_each(case: Case) -> Case:
    """The case at one site of each kind that seams or adapters may treat differently."""
    return first_of_each(case, lambda site: (type(case.method.build(site)), *site_kind(site)))


def first_of_each(case: Case, kind: Callable[[Site], Any]) -> Case:
    """The case at its first site of each kind."""
    kinds: dict[Any, Site] = {}
    for site in case.sites:
        kinds.setdefault(kind(site), site)
    return dataclasses.replace(case, sites=tuple(kinds.values()))


def site_kind(site: Site) -> tuple[Any, ...]:
    """What seams or adapters may treat differently: the type of a site, whether it is called, its kernel and so on."""
    facts = [getattr(site, name, None) for name in ("called", "kind", "kernel", "stride", "groups", "channel_dim")]
    return (type(site), getattr(site, "rows", None) is not None, *facts)


@contextlib.contextmanager
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def _skip_if_host_breaks_graph(case: Case, error: Exception) -> None:
    """Raises `Skip` if the bare host does not compile to a single graph either."""
    bare = case.bare()
    torch._dynamo.reset()
    try:
        run(torch.compile(bare, fullgraph=True, backend="eager"), case.plain(bare))
    except Exception:
        raise Skip(f"{case.host.name} itself does not compile to a single graph: {type(error).__name__}") from error


def _check_half_precision(case: Case, bare: nn.Module, model: nn.Module, attachment: Attachment) -> None:
    inputs, expected = case.inputs(model, attachment), run(bare, case.plain(bare))
    wrong = [name for name, p in attachment.named_parameters() if p.dtype != torch.float32]
    if wrong:
        raise AssertionError(f"{case.method.name}: not in float32: {', '.join(wrong[:5])}")
    got = run(model, inputs)
    if [t.dtype for t in got] != [t.dtype for t in expected]:
        raise AssertionError(
            f"{case.method.name}: outputs are {[t.dtype for t in got]}, the host's {[t.dtype for t in expected]}"
        )
    training_loss(model, attachment, inputs).backward()
    lost = [n for n, p in attachment.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if lost or not all(torch.isfinite(t).all() for t in got):
        raise AssertionError(f"{case.method.name}: outputs or gradients are not finite: {', '.join(lost[:5])}")
    with attachment.enabled(False):
        different(run(model, inputs), got, f"{case.method.name}: disabled against enabled")
        same(run(model, case.plain(model)), expected, f"{case.method.name}: disabled against the host")


def _gradients(case: Case, model: nn.Module, attachment: Attachment) -> dict[str, Tensor]:
    inputs = case.inputs(model, attachment)
    parameters = dict(attachment.named_parameters())
    torch.manual_seed(11)  # hosts with dropout
    grads = torch.autograd.grad(training_loss(model, attachment, inputs), list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}


def _repeat_first(value: Any) -> Any:
    """The input with its second row replaced by the first; inputs without a batch of two are unchanged."""
    if isinstance(value, Tensor):
        return torch.cat([value[:1], value[:1]]) if value.dim() and value.shape[0] == 2 else value
    if isinstance(value, list) and len(value) == 2 and all(isinstance(row, Tensor) for row in value):
        return [value[0], value[0].clone()]
    return {key: _repeat_first(v) for key, v in value.items()} if isinstance(value, dict) else value


def _first_row(outputs: list[Tensor]) -> list[Tensor]:
    """The first row of every output with a batch of two, or the first output of a model that returns a list of rows."""
    return [t[:1] for t in outputs if t.dim() and t.shape[0] == 2] or outputs[:1]


CHECKS = (
    batch_rows_are_independent,
    calls_are_independent,
    half_precision,
    autocast,
    checkpointing_gives_the_same_gradients,
    compiles_to_one_graph,
)

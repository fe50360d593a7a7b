"""Checks of a method: what attaching and training change, and that detaching restores the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment, attachments
from veneer.injection.attachment.model_state import statistics
from veneer.injection.errors import DeadSite
from veneer.injection.method import Adapter, Method
from veneer.injection.quantized_weight import inner_tensors
from veneer.injection.sites import Site

from .case import Case, different, equal, perturb, run, same, training_loss
from .snapshot import assert_same, snapshot


class ProvokedFailure(Exception):
    """The failure that a check provokes."""


def identity_at_start(case: Case) -> None:
    """A new adapter leaves the output bitwise unchanged, unless `identity_at_start` is False, or `changes_at_start` of a site."""
    bare, model = case.bare(), case.fresh()
    case.attach(model)
    expected, got = run(bare, case.plain(bare)), run(model, case.plain(model))
    if not any(case.method.changes_at_start(site) for site in case.sites):
        same(got, expected, f"{case.method.name}: a new adapter changes the output, but identity_at_start is True")
    else:
        different(got, expected, f"{case.method.name}: a new adapter does not change the output, but identity_at_start is False")


def every_site_live(case: Case) -> None:
    """Every adapter parameter affects the output: it gets a gradient, unless the host declares its site inert."""
    model = case.fresh()
    attachment = case.attach(model)
    attachment.probe()
    with torch.no_grad():
        before = [p.clone() for p in attachment.parameters()]
    perturb(attachment)
    inputs = case.inputs(model, attachment)
    got = run(model, inputs)
    with attachment.enabled(False):
        off = run(model, inputs)
    if before and equal(got, off):
        raise DeadSite(f"{case.method.name}: {len(attachment.parts)} sites are adapted, but the output does not change")


def only_the_adapter_trains(case: Case) -> None:
    """Exactly the parameters built by the method require gradients, and none of the host's."""
    model = case.fresh()
    host = {id(p): name for name, p in model.named_parameters()}
    attachment = case.attach(model)
    trained = [host[id(p)] for p in attachment.parameters() if id(p) in host]
    trained += [name for name, p in model.named_parameters() if id(p) in host and p.requires_grad]
    if trained:
        raise AssertionError(f"{case.method.name}: host parameters are trained: {', '.join(trained[:5])}")
    reachable = {id(p) for p in model.parameters()}
    by_id = {id(p): name for name, p in attachment.named_parameters()}
    lost = [name for key, name in by_id.items() if key not in reachable]
    if lost:
        raise AssertionError(f"{case.method.name}: not in the model's module tree, so not moved with it: {', '.join(lost[:5])}")
    hidden = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in by_id]
    if hidden:
        raise AssertionError(f"{case.method.name}: trained, but not among attachment.parameters(): {', '.join(hidden[:5])}")


def host_untouched_after_steps(case: Case) -> None:
    """Two optimizer steps in training mode change every live adapter and no tensor of the host."""
    model = case.fresh()
    before = {name: [part.detach().clone() for part in inner_tensors(t)] for name, t in model.state_dict().items()}
    attachment = case.attach(model)
    start = {name: t.clone() for name, t in attachment.state_dict().items()}
    train(case, model, attachment)
    after = attachment.host_state_dict()
    if list(after) != list(before):
        raise AssertionError(f"{case.method.name}: the keys of host_state_dict() differ from the bare host's state_dict()")
    moving = {name for name, _ in statistics(model.named_modules())}
    changed = [name for name, t in before.items() if name not in moving and not equal(t, inner_tensors(after[name]))]
    if changed:
        raise AssertionError(f"{case.method.name}: training changed the host: {', '.join(changed[:5])}")
    trained = attachment.state_dict()
    still = [name for name in live(attachment) if not any(_changed(name, key, start, trained) for key in start)]
    if still:
        raise AssertionError(f"{case.method.name}: training does not change the adapters at {', '.join(still[:5])}")


def detach_restores(case: Case) -> None:
    """After training and detaching, keys, order, types, hooks, flags, attributes and outputs are bitwise as before."""
    model = case.fresh()
    before, expected = snapshot(model), run(model, case.plain(model))
    attachment = case.attach(model)
    train(case, model, attachment, steps=1)
    attachment.detach()
    if attachments(model):
        raise AssertionError("attachments(model) still lists the detached attachment")
    same(run(model, case.plain(model)), expected, f"{case.method.name}: outputs after detach()")
    assert_same(before, snapshot(model), f"{case.method.name}: detach()")


def sites_stay_while_attached(case: Case) -> None:
    """The host describes the model with adapters like the bare one, so that another attach finds every site."""
    model = case.fresh()
    before = tuple(case.host.sites(model))
    case.attach(model)
    after = tuple(case.host.sites(model))
    changed = [site.name for site in (*before, *after) if site not in before or site not in after]
    if changed:
        raise AssertionError(f"{case.host.name}: sites differ with {case.method.name} attached: {', '.join(changed[:5])}")


def attach_is_atomic(case: Case) -> None:
    """An attach that fails while building, joining, entering or probing leaves no trace."""
    provocations: dict[str, Callable[[Method, str], dict[str, Any]]] = {
        "build() of the last site": lambda method, last: {"method": failing_method(method, last, "build")},
        "enter() of the last adapter": lambda method, last: {"method": failing_method(method, last, "enter")},
        "the probe": lambda method, last: {"method": method, "sample": {"no_such_argument": 0}},
    }
    model = case.fresh()
    before = snapshot(model)
    for what, provoke in provocations.items():
        try:
            case.attach(model, **provoke(case.method, case.sites[-1].name))
        except Exception:
            assert_same(before, snapshot(model), f"{case.method.name}: after a failure in {what}")
        else:
            raise AssertionError(f"{case.method.name}: attach() ignores a failure in {what}")


def two_adapters_compose(case: Case) -> None:
    """Two attachments act together, each can be disabled separately, and they detach in any order.

    If both hold whole tensors (`replaces`), the later one applies.
    """
    alone = [_run_alone(case, i) for i in range(2)]
    model = case.fresh()
    before = snapshot(model)
    for leaving in (0, 1):
        pair = _attach_two(case, model)
        inputs = [case.inputs(model, a) for a in pair]
        staying = 1 - leaving
        what = f"{case.method.name}: with '{pair[0].name}' and '{pair[1].name}'"
        with pair[leaving].enabled(False):
            same(run(model, inputs[staying]), alone[staying], f"{what}, the enabled one alone")
        both = run(model, case.inputs(model, *pair))
        if all(adapter.replaces for _, adapter in pair[1].parts.values()):
            same(both, alone[1], f"{what} enabled, the output against '{pair[1].name}' alone")
        else:
            different(both, alone[staying], f"{what} enabled, the output against '{pair[staying].name}' alone")
        pair[leaving].detach()
        same(run(model, inputs[staying]), alone[staying], f"{what}, after detaching '{pair[leaving].name}'")
        pair[staying].detach()
        assert_same(before, snapshot(model), f"{what}, after detaching both")


def failing_method(method: Method, last: str, where: str) -> Method:
    """The same config, whose `build` or whose adapter's `enter` raises `ProvokedFailure` at the site called `last`."""

    def build(self: Any, site: Site) -> Adapter:
        adapter: Adapter = super(cls, self).build(site)
        if site.name == last:
            if where == "build":
                raise ProvokedFailure(site.name)
            adapter.__dict__["enter"] = fail
        return adapter

    def fail(tower: nn.Module) -> None:
        raise ProvokedFailure(last)

    cls: Any = type(type(method).__name__, (type(method),), {"build": build})
    made: Method = cls(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init})
    return made


def train(case: Case, model: nn.Module, attachment: Attachment, steps: int = 2) -> None:
    """A few optimizer steps in training mode; restores evaluation mode."""
    inputs = case.inputs(model, attachment)
    optimizer = torch.optim.Adam(list(attachment.parameters()), 1e-2)
    model.train()
    for _ in range(steps):
        training_loss(model, attachment, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def live(attachment: Attachment) -> Iterator[str]:
    """Names of the sites whose adapters have parameters that can affect the output."""
    for name, (site, adapter) in attachment.parts.items():
        if not site.inert and any(True for _ in adapter.parameters()):
            yield name


def _changed(site: str, key: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return key.startswith(f"{site}:") and not torch.equal(before[key], after[key])


def _attach_two(case: Case, model: nn.Module) -> list[Attachment]:
    pair = [case.attach(model, case.method, seed=3), case.attach(model, case.other, seed=4)]
    for attachment, seed in zip(pair, (5, 6), strict=True):
        perturb(attachment, seed)
    return pair


def _run_alone(case: Case, index: int) -> list[Tensor]:
    model = case.fresh()
    attachment = case.attach(model, (case.method, case.other)[index], seed=3 + index)
    perturb(attachment, 5 + index)
    return run(model, case.inputs(model, attachment))


CHECKS = (
    identity_at_start,
    every_site_live,
    only_the_adapter_trains,
    host_untouched_after_steps,
    detach_restores,
    sites_stay_while_attached,
    attach_is_atomic,
    two_adapters_compose,
)

"""Checks of a method: its config, parameter counts, initialization, files, and copies of the model."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.injection.attachment.attach import attachments
from veneer.injection.errors import LoadError, SelectionError, UnsupportedSite
from veneer.injection.method import Method
from veneer.injection.registry import methods

from .case import Case, add_conditions, perturb, run, same
from .checks_attach import failing_method
from .snapshot import assert_same, snapshot


def config_round_trip(case: Case) -> None:
    """`from_config(config())` through JSON gives an equal config, and an unknown option is rejected by name."""
    method = case.method
    again = type(method).from_config(json.loads(json.dumps(method.config())))
    if again != method:
        raise AssertionError(f"{method.name}: through JSON {method} becomes {again}")
    try:
        type(method).from_config({**method.config(), "no_such_option": 1})
    except TypeError as error:
        _assert_names(error, "no_such_option", f"{method.name}: the error for an unknown option")
    else:
        raise AssertionError(f"{method.name}: from_config() accepts an unknown option")


def count_equals_built(case: Case) -> None:
    """The paper's formula `count(site)` gives the number of trainable parameters that `build(site)` creates."""
    for site in case.sites:
        method = case.method.at(site)
        built = sum(p.numel() for p in method.build(site).parameters() if p.requires_grad)
        if method.count(site) != built:
            raise AssertionError(f"{site.name}: count() gives {method.count(site)}, build() creates {built} parameters")


def seeded_build_is_reproducible(case: Case) -> None:
    """The same torch seed gives bitwise the same adapters; no other source of randomness is used."""
    states = []
    for _ in range(2):
        attachment = case.attach(case.fresh(), seed=7)
        states.append(attachment.state_dict())
    differ = set(states[0]) ^ set(states[1])
    if differ:
        raise AssertionError(f"{case.method.name}: two builds have different tensors: {', '.join(sorted(differ)[:5])}")
    for name, tensor in states[0].items():
        same([states[1][name]], [tensor], f"{name} built twice with the same seed")


def save_load_save_is_byte_equal(case: Case) -> None:
    """A saved file gives the same outputs on another copy of the base, and saving again gives the same bytes."""
    from veneer.formats import load

    model, attachment = case.attached()
    inputs = case.inputs(model, attachment)
    with tempfile.TemporaryDirectory() as folder, temporarily_registered(case.method):
        first = attachment.save(Path(folder) / "first")
        other = case.fresh()
        torch.manual_seed(1)  # reveals random values that are not saved
        loaded = add_conditions(load(other, first), inputs)
        same(run(other, inputs), run(model, inputs), f"{case.method.name}: loaded from the file against saved")
        if loaded.method != case.method or loaded.where != attachment.where:
            raise AssertionError(f"{case.method.name}: the file gives {loaded.method} at {loaded.where}")
        second = loaded.save(Path(folder) / "second")
        if first.read_bytes() != second.read_bytes():
            raise AssertionError(f"{case.method.name}: the file differs after saving, loading and saving again")


def everything_trained_is_saved(case: Case) -> None:
    """Every parameter given to the optimizer is in `state_dict()`, under `site-name:parameter`, or in `unsaved`."""
    model, attachment = case.attached()
    saved = attachment.state_dict()
    pointers = {t.data_ptr() for t in saved.values()}
    pointers |= {a.get_parameter(key).data_ptr() for _, a in attachment.parts.values() for key in a.unsaved}
    lost = [name for name, p in attachment.named_parameters() if p.numel() and p.data_ptr() not in pointers]
    if lost:
        raise AssertionError(f"{case.method.name}: trained, but not in state_dict(): {', '.join(lost[:5])}")
    inputs, kept = case.inputs(model, attachment), {k: t.clone() for k, t in saved.items()}
    expected = run(model, inputs)
    perturb(attachment, seed=9)
    attachment.load_state_dict(kept)
    same(run(model, inputs), expected, f"{case.method.name}: after load_state_dict()")


def strict_load_names_the_site(case: Case) -> None:
    """A missing, unused or misshapen tensor is an error that names it, and leaves the attachment unchanged."""
    attachment = case.attached()[1]
    state = {k: t.clone() for k, t in attachment.state_dict().items()}
    before = {k: t.clone() for k, t in state.items()}
    name = next(reversed(state))
    spoilt: dict[str, dict[str, Tensor]] = {
        "missing": {k: t + 1 for k, t in state.items() if k != name},
        "misshapen": {**{k: t + 1 for k, t in state.items()}, name: torch.zeros(*state[name].shape, 2)},
        "unused": {**{k: t + 1 for k, t in state.items()}, f"{name}.more": torch.zeros(1)},
    }
    for what, tensors in spoilt.items():
        try:
            attachment.load_state_dict(tensors)
        except LoadError as error:
            _assert_names(error, name, f"{case.method.name}: the error for a {what} tensor")
        else:
            raise AssertionError(f"{case.method.name}: a {what} tensor ({name}) raises no LoadError")
        for key, tensor in attachment.state_dict().items():
            same([tensor], [before[key]], f"{key} after a failed load with a {what} tensor")


def errors_name_the_site(case: Case) -> None:
    """A site that the method rejects, and a selection that matches nothing, are errors that name them."""
    model, last = case.fresh(), case.sites[-1].name
    before = snapshot(model)
    where = "no.such.role"
    tries: dict[str, Callable[[], Any]] = {
        last: lambda: case.attach(model, _rejecting_method(case.method, last)),
        where: lambda: case.attach(model, where=where),
    }
    for word, attempt in tries.items():
        try:
            attempt()
        except (UnsupportedSite, SelectionError) as error:
            _assert_names(error, word, f"{case.method.name}: the error")
            assert_same(before, snapshot(model), f"{case.method.name}: after a failed attach")
        else:
            raise AssertionError(f"{case.method.name}: attach() ignores {word}")


def deepcopy_is_independent(case: Case) -> None:
    """A deep copy of an attached model has its own adapters: values, switching and detaching are independent."""
    bare, (model, attachment) = case.bare(), case.attached()
    inputs = case.inputs(model, attachment)
    expected = run(model, inputs)
    twin = copy.deepcopy(model)
    (other,) = attachments(twin)
    same(run(twin, inputs), expected, f"{case.method.name}: a deep copy")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    alike = case.fresh()
    case.attach(alike).load_state_dict(other.state_dict())
    same(run(twin, inputs), run(alike, inputs), f"{case.method.name}: a copy with other values against an attach with these")
    same(run(model, inputs), expected, f"{case.method.name}: the original, after changing the copy's values")
    other.scale = 0.0
    same(run(model, inputs), expected, f"{case.method.name}: the original, after disabling its copy")
    other.detach()
    same(run(model, inputs), expected, f"{case.method.name}: the original, after detaching its copy")
    twin.requires_grad_(False)  # like `bare`; detach restored requires_grad
    same(run(twin, case.plain(twin)), run(bare, case.plain(bare)), f"{case.method.name}: the copy, detached")
    if attachments(model) != [attachment] or attachments(twin):
        raise AssertionError(f"{case.method.name}: a copy and its original share their list of attachments")


@contextlib.contextmanager
def temporarily_registered(method: Method) -> Iterator[None]:
    """Registers a method temporarily that is in no file and no distribution, as loading requires."""
    known = method.name in methods.names()
    if not known:
        methods.register(type(method))
    try:
        yield
    finally:
        if not known:
            methods.unregister(method.name)


def _rejecting_method(method: Method, last: str) -> Method:
    """The same config, which rejects one site with a `ValueError`."""
    made = failing_method(method, last, "build")

    def build(self: Any, site: Any) -> Any:
        if site.name == last:
            raise ValueError("this site is rejected")
        return method.build(site)

    type(made).build = build  # type: ignore[method-assign]
    return made


def _assert_names(error: Exception, word: str, what: str) -> None:
    if word not in str(error):
        raise AssertionError(f"{what} does not name '{word}': {error}") from error


CHECKS = (
    config_round_trip,
    count_equals_built,
    seeded_build_is_reproducible,
    save_load_save_is_byte_equal,
    everything_trained_is_saved,
    strict_load_names_the_site,
    errors_name_the_site,
    deepcopy_is_independent,
)
METHOD_AXIS = (config_round_trip, seeded_build_is_reproducible, strict_load_names_the_site, errors_name_the_site)

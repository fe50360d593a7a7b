"""Two methods on one model of each host: each acts as if the other's update had been added to the weights by hand."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.matrix.selection import REPRESENTATIVES, with_fewer_sites
from veneer.injection import Attachment, attachments
from veneer.injection.host import Host
from veneer.injection.method import Method
from veneer.injection.registry import hosts, methods
from veneer.injection.sites import NormSite, ParamSite, WeightSite
from veneer.testing.case import Case, close, merges_at, perturb, run, same, usable_sites
from veneer.testing.snapshot import assert_same, snapshot

FOLDED = "lora"


def _case(method: str, host: Host, model: str) -> Case:
    """A method at one site of each kind of a small model."""
    config, other = methods.get(method).examples()
    return with_fewer_sites(Case(config, host, model, usable_sites(config, host, model), other))


def _fits(method: str, host: Host, model: str) -> bool:
    """True if the method has a site in the model."""
    return bool(usable_sites(methods.get(method).examples()[0], host, model))


@functools.cache
def _pairs() -> list[Any]:
    pairs = []
    for name in hosts.names():
        host = hosts.get(name)()
        for place, second in enumerate(sorted({*methods.names()} - {FOLDED})):
            fitting = [m for m in host.core() if _fits(FOLDED, host, m) and _fits(second, host, m)]
            for model in fitting[place % len(fitting) :][:1] if fitting else ():
                pair = _case(FOLDED, host, model), _case(second, host, model)
                pairs.append(pytest.param(*pair, id=f"{FOLDED}-{second}-{name}-{model}"))
    return pairs


together = pytest.mark.parametrize(("first", "second"), _pairs())


def _in_turn() -> Iterator[Any]:
    """Pairs with the index of the one that leaves first: two for each method, and one for each host and representative."""
    hosts_of: dict[str, list[Any]] = {}
    for pair in _pairs():
        hosts_of.setdefault(pair.values[1].method.name, []).append(pair)
    for place, (method, several) in enumerate(hosts_of.items()):
        turns = [*enumerate(several if len(several) > 1 else several * 2)]
        start = place % (len(turns) - 1)
        for turn, pair in turns if method in REPRESENTATIVES else turns[start : start + 2]:
            leaving = (place + turn) % 2
            yield pytest.param(*pair.values, leaving, id=f"{pair.id}-{('first', 'second')[leaving]} leaves first")


def _attach(model: nn.Module, case: Case, seed: int) -> Attachment:
    attachment = case.attach(model, seed=seed)
    perturb(attachment, seed)
    return attachment


@together
def test_both_equal_one_beside_weights_that_hold_the_other(first: Case, second: Case) -> None:
    model, by_hand = first.fresh(torch.float64), first.fresh(torch.float64)
    pair = [_attach(model, first, 1), _attach(model, second, 2)]
    if all(merges_at(*part) for part in pair[1].parts.values()):
        _write(by_hand, pair)
        inputs = second.plain(by_hand)
    else:
        _write(by_hand, pair[:1])
        beside = _attach(by_hand, second, 2)
        beside.load_state_dict(pair[1].state_dict())
        inputs = second.inputs(by_hand, beside)
    close(run(model, second.inputs(model, *pair)), run(by_hand, inputs), 1e-5, "both attached")


@pytest.mark.parametrize(("first", "second", "leaving"), [*_in_turn()])
def test_each_is_alone_when_the_other_is_off_or_gone(first: Case, second: Case, leaving: int) -> None:
    cases = (first, second)
    model = first.fresh()
    before = snapshot(model)
    pair = [_attach(model, case, seed) for seed, case in enumerate(cases)]
    staying = 1 - leaving
    alone = first.fresh()
    beside = _attach(alone, cases[staying], staying)
    if cases[staying].method.selects:  # by gradients, which the other one changes
        beside.load_state_dict(pair[staying].state_dict())
    inputs = cases[staying].inputs(alone, beside)
    expected = run(alone, inputs)
    with pair[leaving].enabled(False):
        same(run(model, inputs), expected, "the other one off")
    pair[leaving].detach()
    assert attachments(model) == [pair[staying]]
    same(run(model, inputs), expected, "the other one gone")
    pair[staying].detach()
    assert_same(before, snapshot(model), "both gone")


def _write(model: nn.Module, several: list[Attachment]) -> None:
    """Add the updates of attachments to the weights of the bare model, in the order of attaching, by rows for slices."""
    with torch.no_grad():
        for site, adapter in (part for attachment in several for part in attachment.parts.values()):
            assert isinstance(site, (WeightSite, ParamSite, NormSite))
            change: Any = adapter
            rows = _rows(model, f"{site.path}.{site.param}".lstrip("."), site.rows)
            weight = rows.clone()
            if hasattr(change, "bias"):
                assert isinstance(site, (WeightSite, NormSite))
                shift = _rows(model, site.bias, getattr(site, "bias_rows", None))
                shift.copy_(change.bias(shift, lambda weight=weight: weight))
            rows.copy_(change.weight(weight))


def _rows(model: nn.Module, path: str, rows: tuple[int, int] | None) -> Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Any = getattr(model.get_submodule(owner), name)  # a parameter, or a buffer such as the keys' bias of BEiT
    return tensor.data[slice(*rows)] if rows else tensor.data


def test_each_method_leaves_first_and_last() -> None:
    turns = [(p.values[1].method.name, p.values[2]) for p in _in_turn()]
    assert {*turns} == {(name, leaving) for name in {*methods.names()} - {FOLDED} for leaving in (0, 1)}


def test_methods_are_pairs_here_only_where_they_fit() -> None:
    assert issubclass(methods.get(FOLDED), Method)
    pairs = {p.id.rpartition("-")[0] for p in _pairs()}
    assert {"lora-bitfit-timm_vit", "lora-vpt-timm_vit", "lora-textual_inversion-clip_text"} <= pairs
    assert "lora-vpt-timm_swin" not in pairs

"""Checks of a method: strength, switching, and merging into weights, against explicitly built weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection.adapter_forms import BiasAdapter, OutputAdapter
from veneer.injection.attachment.attachment import Attachment
from veneer.injection.errors import StateError, UnsupportedSite
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.seams.effective_weight import BiasForm, bias_site, constant_weight
from veneer.injection.sites import NormSite, ParamSite, Site, WeightSite

from .case import Case, close, different, merges_at, run, same
from .records import Skip
from .snapshot import assert_same, snapshot

EXACT = 1e-5  # in double precision; some hosts compute a softmax in single precision


def disabled_equals_host(case: Case) -> None:
    """Inside `enabled(False)` the output is bitwise the host's, and afterwards the adapter's again."""
    bare, (model, attachment) = case.bare(), case.attached()
    expected, inputs = run(bare, case.plain(bare)), case.inputs(model, attachment)
    on = run(model, inputs)
    with attachment.enabled(False):
        same(run(model, case.plain(model)), expected, f"{case.method.name}: disabled")
        different(run(model, inputs), on, f"{case.method.name}: disabled against enabled")
    same(run(model, inputs), on, f"{case.method.name}: enabled again")


def scale_zero_equals_host(case: Case) -> None:
    """At scale 0 the output is bitwise the host's, at 1 the adapter's, and in between neither."""
    bare, (model, attachment) = case.bare(), case.attached()
    inputs = case.inputs(model, attachment)
    on = run(model, inputs)
    attachment.scale = 0.0
    same(run(model, case.plain(model)), run(bare, case.plain(bare)), f"{case.method.name}: at scale 0")
    off = run(model, inputs)
    if not case.switches:
        attachment.scale = 0.5
        half = run(model, inputs)
        different(half, off, f"{case.method.name}: scale 0.5 against 0")
        different(half, on, f"{case.method.name}: scale 0.5 against 1")
    attachment.scale = 1.0
    same(run(model, inputs), on, f"{case.method.name}: back at scale 1")


def weight_form_equals_output_form(case: Case) -> None:
    """At every called site with both forms, the module with W' = weight(W) gives the same as output(x, y)."""
    model, attachment = case.attached(torch.float64)
    both: dict[str, tuple[Any, Any]] = {n: (s, a) for n, (s, a) in attachment.parts.items() if _has_both(s, a)}
    both = {n: (s, a) for n, (s, a) in both.items() if not case.is_quantized_at(s)}
    if not both:
        raise Skip(f"{case.method.name} does not have both forms at a float weight")
    inputs = case.inputs(model, attachment)
    attachment.detach()
    calls = _calls(model, {site.path for site, _ in both.values()}, inputs)
    for name, (site, adapter) in both.items():
        args, kwargs, y = calls[site.path]
        x = args[0] if args else next(iter(kwargs.values()))
        module = model.get_submodule(site.path)
        dim = (1 if site.kind == "conv" else -1) if isinstance(site, WeightSite) else site.channel_dim
        with torch.no_grad():
            changed = {site.param: _apply_weight_form(base_tensor(model, site.path, site.param), site, adapter)}
            if isinstance(adapter, BiasAdapter):
                shift, below = bias_site(site, adapter), constant_weight(base_tensor(model, site.path, site.param), site.rows)
                bias = base_tensor(model, shift.path, shift.param)
                changed[site.bias.removeprefix(f"{site.path}.")] = _apply_weight_form(bias, shift, BiasForm(adapter, below))
            expected = torch.func.functional_call(module, changed, args, kwargs)
            got = adapter.output(x, _rows(y, site, dim))
        close([got], [_rows(expected, site, dim)], _precision(y), f"{name}: output(x, y) against the module with weight(W)")


def _precision(y: Tensor) -> float:
    """Tolerance in double precision; larger if the module computes in single precision, as some norms do."""
    return 1e-6 if torch.equal(y, y.float().to(y.dtype)) else 1e-9


def merge_equals_explicit_change(case: Case) -> None:
    """merge() writes W + s·(weight(W) − W) into every tensor, which gives the attached model's outputs."""
    case.merging()
    model, attachment = case.attached(torch.float64)
    inputs = case.inputs(model, attachment)
    for scale in (1.0, 0.5):
        attachment.scale = scale
        expected, attached = _expected_merge(model, attachment, scale), run(model, inputs)
        report = attachment.merge()
        if report.tensors != len(expected):
            raise AssertionError(f"{case.method.name}: merge() reports {report.tensors} tensors, {len(expected)} are adapted")
        for (path, param), tensor in expected.items():
            rounding = 1e-9 if base_tensor(model, path, param).dtype == torch.float64 else 1e-6
            close(
                [base_tensor(model, path, param)], [tensor], rounding, f"{path}.{param} merged at scale {scale} against W + s·ΔW"
            )
        close(run(model, inputs), attached, EXACT, f"{case.method.name}: merged at scale {scale} against attached")
        attachment.unmerge()


def unmerge_is_bitwise(case: Case) -> None:
    """unmerge() restores every weight and output bitwise, and a later detach() restores the host."""
    case.merging()
    model = case.fresh()
    before = snapshot(model)
    attachment = case.attach(model)
    with torch.no_grad():
        for p in attachment.parameters():
            p.add_(0.1)
    inputs = case.inputs(model, attachment)
    on = run(model, inputs)
    attachment.merge()
    try:
        attachment.detach()
    except StateError:
        pass
    else:
        raise AssertionError(f"{case.method.name}: detach() of a merged attachment raises no StateError")
    attachment.unmerge()
    same(run(model, inputs), on, f"{case.method.name}: after unmerge()")
    attachment.detach()
    assert_same(before, snapshot(model), f"{case.method.name}: merge(), unmerge(), detach()")


def merge_is_refused_without_a_weight_form(case: Case) -> None:
    """If an adapter has no weight form, merge() raises and changes nothing."""
    if all(merges_at(site, case.method.build(site)) for site in case.sites):
        raise Skip(f"{case.method.name} has a weight form everywhere")
    model, attachment = case.attached()
    inputs = case.inputs(model, attachment)
    before, on = snapshot(model), run(model, inputs)
    try:
        attachment.merge()
    except UnsupportedSite as error:
        if not any(site.name in str(error) for site in case.sites):
            raise AssertionError(f"{case.method.name}: the error of merge() names no site: {error}") from error
    else:
        raise AssertionError(f"{case.method.name}: merge() without a weight form raises no UnsupportedSite")
    same(run(model, inputs), on, f"{case.method.name}: after the failed merge()")
    assert_same(before, snapshot(model), f"{case.method.name}: the failed merge()")


def _has_both(site: Site, adapter: Any) -> bool:
    place = isinstance(site, (WeightSite, ParamSite, NormSite)) and site.called
    return place and isinstance(adapter, OutputAdapter) and merges_at(site, adapter)


def _calls(model: nn.Module, paths: set[str], inputs: dict[str, Any]) -> dict[str, tuple[Any, Any, Tensor]]:
    """Arguments and output of the first call of each module."""
    found: dict[str, tuple[Any, Any, Tensor]] = {}
    names = {id(model.get_submodule(path)): path for path in paths}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        found.setdefault(names[id(module)], (args, kwargs, y.clone()))  # later operations may modify y in place

    handles = [model.get_submodule(path).register_forward_hook(keep, with_kwargs=True) for path in paths]
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def _rows(y: Tensor, site: Any, dim: int) -> Tensor:
    return y if site.rows is None else y.narrow(dim, site.rows[0], site.rows[1] - site.rows[0])


def _apply_weight_form(weight: Tensor, site: Any, adapter: Any, scale: float = 1.0) -> Tensor:
    """W with the site's rows replaced by W + s·(weight(W) − W), from the adapter's weight form at strength 1."""
    rows = slice(*site.rows) if site.rows else ...  # a scalar has no rows to slice
    changed = weight.detach().clone()
    part = weight.detach()[rows]
    changed[rows] = part + scale * (adapter.weight(part) - part)
    return changed


def _expected_merge(model: nn.Module, attachment: Attachment, scale: float) -> dict[tuple[str, str], Tensor]:
    """Expected value of every adapted tensor after a merge, by path and parameter."""
    found: dict[tuple[str, str], Tensor] = {}
    attachment.scale = 1.0
    with torch.no_grad():
        for site, adapter in attachment.parts.values():
            assert isinstance(site, (WeightSite, ParamSite, NormSite))
            weight = found.get((site.path, site.param), base_tensor(model, site.path, site.param))
            found[site.path, site.param] = _apply_weight_form(weight, site, adapter, scale)
            if isinstance(adapter, BiasAdapter):
                shift = bias_site(site, adapter)
                bias = found.get((shift.path, shift.param), base_tensor(model, shift.path, shift.param))
                below = constant_weight(base_tensor(model, site.path, site.param).detach(), site.rows)
                found[shift.path, shift.param] = _apply_weight_form(bias, shift, BiasForm(adapter, below), scale)
    attachment.scale = scale
    return found


CHECKS = (
    disabled_equals_host,
    scale_zero_equals_host,
    weight_form_equals_output_form,
    merge_equals_explicit_change,
    unmerge_is_bitwise,
    merge_is_refused_without_a_weight_form,
)

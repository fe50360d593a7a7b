"""Diff pruning: the gates against plain formulas, exactly the kept entries, the fixed phase, files, and bad input."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import veneer
from tests.methods.runs import check_resume
from tests.methods.selections import MODELS, explicit, tiny
from tests.raising import raises
from veneer.injection import Attachment, attach
from veneer.injection.errors import NotSelected, OptionError, StateError
from veneer.injection.sites import ParamSite
from veneer.methods.selective.entries.diff_pruning import DiffPruning
from veneer.testing.case import loss
from veneer.training import param_groups

WHERE = "mlp.out"


def adapters_of(tuned: Attachment) -> list[Any]:
    return [adapter for _, adapter in tuned.parts.values()]


def perturbed(tuned: Attachment, seed: int = 3) -> list[Any]:
    """The adapters with updates and logits that open some gates, close some, and clamp neither of most."""
    torch.manual_seed(seed)
    for adapter in adapters_of(tuned):
        nn.init.normal_(adapter.delta, std=0.1)
        nn.init.normal_(adapter.logits)
        if adapter.group_logits is not None:
            nn.init.normal_(adapter.group_logits, std=0.1)
    return adapters_of(tuned)


def gate(logits: Tensor, noise: Tensor | float) -> Tensor:
    """min(1, max(0, 3 s − 1.5)), written out."""
    stretched = 3 / (1 + torch.exp(-(logits + noise))) - 1.5
    return torch.minimum(torch.ones_like(stretched), torch.maximum(torch.zeros_like(stretched), stretched))


def gated_deltas(adapters: list[Any], leaves: list[list[Tensor]]) -> list[Tensor]:
    """z_g ∘ z ∘ w of each adapter with its present noise. `leaves`: w, a, and a_g if there is one."""
    deltas = []
    for adapter, (delta, logits, *group) in zip(adapters, leaves, strict=True):
        gates = gate(logits, adapter.noise if adapter.training else 0.0)
        if group:
            gates = gates * gate(group[0], adapter.group_noise if adapter.training else 0.0)
        deltas.append(gates * delta)
    return deltas


def leaves_of(adapters: list[Any]) -> list[list[Tensor]]:
    return [[p.detach().clone().requires_grad_() for p in adapter.parameters()] for adapter in adapters]


def functional_loss(bare: nn.Module, tuned: Attachment, deltas: list[Tensor], sample: Any) -> Tensor:
    """The loss of the bare model with W + ΔW, differentiable in ΔW."""
    named = dict(bare.named_parameters())
    for (site, _), delta in zip(tuned.parts.values(), deltas, strict=True):
        key = f"{site.path}.{site.param}".lstrip(".")
        whole = torch.zeros_like(named[key]).index_copy(0, torch.arange(*site.rows), delta) if site.rows else delta
        named[key] = named[key] + whole

    class Call:
        def __call__(self, **inputs: Any) -> Any:
            return torch.func.functional_call(bare, named, (), inputs)

    return loss(Call(), sample)


@pytest.mark.parametrize(
    ("host", "name", "groups"), [(*m, g) for m, g in zip(MODELS, ("tensor", "row", "none", "row"), strict=True)]
)
def test_outputs_and_gradients_with_sampled_gates(host: str, name: str, groups: str) -> None:
    model, samples = tiny(host, name)
    bare = copy.deepcopy(model)
    tuned = attach(model, DiffPruning(gate_groups=groups), where="attn@0")
    adapters = perturbed(tuned)
    for adapter in adapters:
        adapter.train()
    tuned.begin_pass(5, 2)
    leaves = leaves_of(adapters)
    assert {len(of_one) for of_one in leaves} == {2 if groups == "none" else 3}
    expected = functional_loss(bare, tuned, gated_deltas(adapters, leaves), samples[0])
    got = loss(model, samples[0])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    flat = [leaf for of_one in leaves for leaf in of_one]
    torch.testing.assert_close(
        torch.autograd.grad(got, [p for adapter in adapters for p in adapter.parameters()], allow_unused=True),
        torch.autograd.grad(expected, flat, allow_unused=True), rtol=1e-5, atol=1e-8,
    )  # fmt: skip
    for adapter in adapters:
        adapter.eval()
    with torch.no_grad():
        expected = functional_loss(bare, tuned, gated_deltas(adapters, leaves), samples[1])
        torch.testing.assert_close(loss(model, samples[1]), expected, rtol=1e-6, atol=1e-7)


def test_the_noise_is_a_function_of_the_pass() -> None:
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, "diff_pruning", where=WHERE)
    first, second, *_ = adapters_of(tuned)
    noises = []
    for key in ((1, 1, 0), (1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1)):
        tuned.begin_pass(*key)
        noises.append(first.noise)
        assert not torch.equal(first.noise, second.noise)
    same = [torch.equal(noises[0], noise) for noise in noises]
    assert same == [True, True, False, False, False]
    uniform = torch.sigmoid(noises[0])
    assert 0 < uniform.min() < 0.05 < 0.95 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.05


def test_initial_gates_open_with_the_published_probability_and_the_penalty_counts_them() -> None:
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, DiffPruning(sparsity_penalty=2.0), where=WHERE)
    count = sum(p.numel() for name, p in tuned.named_parameters() if name.endswith("logits"))
    assert tuned.penalty().item() == pytest.approx(2.0 * 0.99330715 * count)
    other = attach(tiny("timm_vit", "vit")[0], DiffPruning(sparsity_penalty=1.0, lower=-0.1, upper=1.1), where=WHERE)
    adapters = perturbed(other)
    logits = torch.cat([t.flatten() for adapter in adapters for t in (adapter.logits, adapter.group_logits)])
    torch.testing.assert_close(other.penalty(), torch.sigmoid(logits - math.log(0.1 / 1.1)).sum())
    (plain, scaled) = param_groups.parameter_groups([other], {"diff_pruning": 5e-5}, 1.0, 5e-5)
    assert [len(g["params"]) for g in (plain, scaled)] == [len(adapters), 2 * len(adapters)]
    assert plain["lr_scale"] == 1.0
    assert "weight_decay" not in plain
    assert scaled["lr_scale"] * 5e-5 == pytest.approx(0.1)
    assert scaled["weight_decay"] == 0.0
    assert all(bool((adapter.evaluated_update() == 0).all()) for adapter in adapters_of(tuned))


def run_steps(model: nn.Module, tuned: Attachment, samples: list[Any], first: int, last: int, steps: int) -> None:
    optimizer = torch.optim.SGD([{"params": g["params"], "lr": 0.05 * g["lr_scale"]} for g in tuned.groups()])
    for step in range(first, last + 1):
        tuned.begin_pass(0, step - 1)
        (loss(model, samples[step % 2]) + (tuned.penalty() or 0)).backward()
        optimizer.step()
        tuned.after_step(step, steps)
        optimizer.zero_grad()


def test_a_run_keeps_exactly_the_largest_entries_and_trains_them_alone(tmp_path: Path) -> None:
    model, samples = tiny("timm_vit", "vit")
    bare = copy.deepcopy(model)
    method = DiffPruning(keep_ratio=0.1, search=0.5, gate_rate=1.0)
    tuned = attach(model, method, where=WHERE)
    adapters = perturbed(tuned)
    total = sum(adapter.delta.numel() for adapter in adapters)
    count = math.floor(0.1 * total)
    assert [method.schedule_end(steps) for steps in (1, 6, 7)] == [1, 3, 4]
    assert tuned.report().summary == f"{count:,} of {total:,} entries to be selected"
    for adapter in adapters:
        adapter.train()
    run_steps(model, tuned, samples, 1, 2, 6)
    assert not any(adapter.fixed for adapter in adapters)
    twin_model = copy.deepcopy(model)
    (twin,) = veneer.injection.attachments(twin_model)
    run_steps(twin_model, twin, samples, 3, 3, 7)  # the same step without its pruning
    updates = torch.cat([adapter.evaluated_update() for adapter in adapters_of(twin)])
    run_steps(model, tuned, samples, 3, 3, 6)
    kept = torch.cat([adapter.kept.flatten() for adapter in adapters])
    assert int(kept.sum()) == count
    assert kept.nonzero().flatten().tolist() == sorted(updates.abs().argsort(descending=True)[:count].tolist())
    values = torch.cat([adapter.delta.flatten() for adapter in adapters]).detach().clone()
    torch.testing.assert_close(values, updates * kept)
    assert tuned.report().summary == f"{count:,} of {total:,} entries selected"
    assert tuned.penalty() is None
    logits = [adapter.logits.clone() for adapter in adapters]
    run_steps(model, tuned, samples, 4, 6, 6)
    trained = torch.cat([adapter.delta.flatten() for adapter in adapters])
    assert bool((trained != values)[kept].any())
    assert bool((trained == 0)[~kept].all())
    assert all(torch.equal(adapter.logits, before) for adapter, before in zip(adapters, logits, strict=True))
    expected = explicit(bare, tuned, [adapter.delta.detach() for adapter in adapters])
    for adapter in adapters:
        adapter.eval()
    torch.testing.assert_close(loss(model, samples[0]), loss(expected, samples[0]), rtol=1e-6, atol=1e-7)
    check_finished_run(tuned, model, samples, count, tmp_path)


def check_finished_run(tuned: Attachment, model: nn.Module, samples: list[Any], count: int, folder: Path) -> None:
    """`finalize` changes no output, and a file has `count` values and indices, which can be trained further."""
    before = loss(model, samples[0])
    for _ in range(2):
        tuned.finalize()
    assert isinstance(tuned.method, DiffPruning)
    assert tuned.method.phase == "fixed"
    torch.testing.assert_close(loss(model, samples[0]), before)
    (values,) = tuned.parameters()
    assert values.shape == (count,)
    path = tuned.save(folder / "sparse")
    assert path.stat().st_size < 12 * count + 12_000
    other, _ = tiny("timm_vit", "vit")
    loaded = veneer.load(other, path)
    assert torch.equal(loss(other, samples[0]), loss(model, samples[0]))
    loaded.begin_pass(0, 0)
    loss(other, samples[0]).backward()
    assert next(iter(loaded.parameters())).grad is not None
    loaded.merge()
    torch.testing.assert_close(loss(other, samples[0]), before)


@pytest.mark.parametrize(("stop", "fixed"), [(4, False), (9, True)])
def test_a_resumed_run_is_bitwise_the_same(stop: int, fixed: bool, tmp_path: Path) -> None:
    """Stopped in each phase."""
    stopped = check_resume(DiffPruning(keep_ratio=0.1, gate_rate=1.0), tmp_path, stop, WHERE)
    assert all(bool(t) == fixed for name, t in stopped.named.items() if name.endswith(":fixed"))


def test_averaged_updates_are_stored_at_the_kept_entries_only() -> None:
    """EMA knows updates from before the pruning; `finalize` in its scope stores their average at the remaining entries."""
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, DiffPruning(keep_ratio=0.1), where=WHERE)
    adapters = perturbed(tuned)
    tuned.after_step(4, 4)
    kept = torch.cat([adapter.kept.flatten() for adapter in adapters])
    torch.manual_seed(4)
    for adapter in adapters:
        nn.init.normal_(adapter.delta)
    average = torch.cat([adapter.delta.detach().flatten() for adapter in adapters])
    tuned.finalize()
    entries = adapters[0].own
    torch.testing.assert_close(entries.values, average[kept])
    assert torch.equal(entries.indices.long(), kept.nonzero().flatten())


def test_finalize_prunes_a_run_that_was_never_pruned() -> None:
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, DiffPruning(keep_ratio=0.01), where=WHERE)
    adapters = perturbed(tuned)
    updates = torch.cat([adapter.evaluated_update() for adapter in adapters])
    tuned.finalize()
    top = updates.abs().topk(int(0.01 * len(updates))).indices.sort().values
    assert torch.equal(adapters[0].own.indices.long(), top)


def test_a_merge_in_training_mode_has_no_noise() -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "diff_pruning", where=WHERE)
    perturbed(tuned)
    expected = loss(model.eval(), samples[0])
    model.train()
    tuned.begin_pass(0, 0)
    tuned.merge()
    assert all(adapter.training for adapter in adapters_of(tuned))
    torch.testing.assert_close(loss(model.eval(), samples[0]), expected)


def test_counts() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    tuned = attach(vit, "diff_pruning")
    assert tuned.report().trainable == 169_869_384 == 2 * 84_934_656 + 72
    assert tuned.report().summary == "424,673 of 84,934,656 entries to be selected"
    tuned.detach()
    assert attach(vit, "diff_pruning", phase="fixed", where="*").report().trainable == 428_993


def test_training_without_sampled_gates_or_without_a_file_is_an_error() -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "diff_pruning", where=WHERE)
    model.train()
    with raises(StateError, where=next(iter(tuned.parts)), given="training", expected="begin_pass"):
        loss(model, samples[0])
    tuned.begin_pass(0, 0)
    loss(model, samples[0])
    tuned.detach()
    fixed = attach(model, "diff_pruning", where=WHERE, phase="fixed")
    with raises(NotSelected, where="phase", given="diff_pruning", expected="search"):
        fixed.begin_pass(0, 0)


@pytest.mark.parametrize(
    ("option", "given"),
    [
        *[("keep_ratio", 0.0), ("keep_ratio", 1.5), ("gate_groups", "rows"), ("search", 0.0), ("search", 1.1), ("lower", 0.0)],
        *[("sparsity_penalty", -1.0), ("upper", 1.0), ("gate_rate", 0.0), ("phase", "end"), ("initial_logit", math.inf)],
    ],
)
def test_bad_options(option: str, given: Any) -> None:
    with raises(OptionError, method="diff_pruning", option=option, given=given):
        DiffPruning(**{option: given})


@pytest.mark.parametrize(
    ("groups", "expected"), [("none", [None] * 3), ("tensor", [(1, 1), (1,), ()]), ("row", [(4, 1), (4,), ()])]
)
def test_shapes_of_the_gates_of_groups(groups: Any, expected: list[tuple[int, ...] | None]) -> None:
    """Of a matrix, a vector and a scalar."""
    for shape, of_group in zip([(4, 3), (4,), ()], expected, strict=True):
        site = ParamSite(name="p", role="bias", path="m", param="p", shape=shape)
        adapter = DiffPruning(gate_groups=groups).build(site).eval()
        logits = adapter.group_logits
        assert (None if logits is None else tuple(logits.shape)) == of_group
        assert adapter.weight(torch.zeros(shape)).shape == shape

"""AdaLoRA's equations against sums written out, its schedule and pruning, and whole steps against peft."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import veneer
from tests.hosts.published import build
from tests.methods.layers import site_of, trained
from tests.raising import raises
from veneer.functional.importance import cubic_budget, largest_mask
from veneer.injection import attach, hosts
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank.adalora import TRAINED, AdaLoRA, AdaLoRAAdapter

LAYERS = [
    nn.Linear(7, 6),
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 8, (3, 1), groups=2, dilation=2),
    nn.Conv1d(4, 4, 3),
]


def in_group(adapter: AdaLoRAAdapter, i: int) -> tuple[slice, int]:
    """The outputs of triplet i's group, and its column of P there."""
    rank, height = adapter.up.shape[1], adapter.site.d_out // adapter.site.groups
    return slice(i // rank * height, (i // rank + 1) * height), i % rank


def columns(adapter: AdaLoRAAdapter, tensor: Tensor) -> list[Tensor]:
    """A tensor of P's shape, triplet by triplet."""
    places = [in_group(adapter, i) for i in range(len(adapter.values))]
    return [tensor[rows, column].flatten() for rows, column in places]


# the change


@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_the_equation_in_both_forms(base: Any) -> None:
    """W' = W + s·Σ_i λ_i P_i Q_iᵀ."""
    base, site = copy.deepcopy(base).double(), site_of(base)
    adapter: Any = trained(AdaLoRA(rank=4, target_rank=2, alpha=2.0), site)
    change = torch.zeros_like(base.weight)
    for i, column in enumerate(columns(adapter, adapter.up)):
        rows, _ = in_group(adapter, i)
        change[rows] = change[rows] + torch.outer(column, adapter.values[i] * adapter.down[i].flatten()).view_as(change[rows])
    expected = copy.deepcopy(base)
    expected.weight.data = (base.weight + 0.5 * change).detach()
    x = torch.randn((3, 5, 7) if site.kind == "linear" else (2, 4, *(7, 6)[: len(site.kernel)]), dtype=torch.float64)
    torch.testing.assert_close(adapter.weight(base.weight), expected.weight.data)
    torch.testing.assert_close(adapter.output(x, base(x)), expected(x))


@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_a_new_adapter_is_the_identity_and_its_count_is_the_formula(base: Any) -> None:
    method, site = AdaLoRA(rank=4, target_rank=2), site_of(base)
    adapter = method.build(site)
    assert torch.equal(adapter.weight(base.weight), base.weight)
    assert adapter.up.abs().min() > 0
    assert adapter.down.abs().min() > 0
    assert method.count(site) == sum(p.numel() for p in adapter.parameters())
    assert list(adapter.state_dict()) == ["up", "values", "down"]


def test_initialization_has_the_deviation_of_the_authors_code() -> None:
    adapter = AdaLoRA(rank=64, target_rank=2).build(WeightSite(name="l", role="l", path="l", d_out=400, d_in=300))
    for drawn in (adapter.up, adapter.down):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.02)


def test_published_count() -> None:
    """ViT-B/16's q and v at rank 12: 24 matrices of 768·12 + 12 + 12·768."""
    assert attach(build("vit_b"), "adalora", where="attn.{q,v}").report().trainable == 24 * (2 * 768 * 12 + 12)


# importance


@pytest.mark.parametrize("base", LAYERS[:3], ids=repr)
def test_scores_are_those_of_equations_7_to_11(base: Any) -> None:
    """One entry at a time: Ī and Ū over four steps, s = Ī·Ū, and the mean over each triplet's column and row."""
    method = AdaLoRA(rank=4, target_rank=2, beta1=0.7, beta2=0.6, every=100)
    adapter: Any = trained(method, site_of(base))
    smooth = {n: torch.zeros_like(adapter.get_parameter(n)) for n in TRAINED}
    unsure = {n: torch.zeros_like(t) for n, t in smooth.items()}
    for step in range(1, 5):
        for name in TRAINED:
            p = adapter.get_parameter(name)
            p.data.normal_()
            p.grad = torch.randn_like(p)
            flat = [t.view(-1) for t in (p.detach(), p.grad, smooth[name], unsure[name])]
            for e in range(p.numel()):
                now = abs(flat[0][e] * flat[1][e])
                flat[2][e] = 0.7 * flat[2][e] + 0.3 * now
                flat[3][e] = 0.6 * flat[3][e] + 0.4 * abs(now - flat[2][e])
        method.after_step([(adapter.site, adapter)], step, 100)
    s = {n: smooth[n] * unsure[n] for n in TRAINED}
    expected = [s["values"][i] + c.mean() + s["down"][i].mean() for i, c in enumerate(columns(adapter, s["up"]))]
    torch.testing.assert_close(adapter.scores(), torch.stack(expected))


def test_the_penalty_is_the_mean_distance_from_orthonormal_vectors() -> None:
    method = AdaLoRA(rank=4, target_rank=2, orthogonality=0.3)
    parts = [(site_of(base), trained(method, site_of(base))) for base in LAYERS]
    total = 0.0
    for _, adapter in parts:
        for vectors in (columns(adapter, adapter.up), [row.flatten() for row in adapter.down]):
            square = 0.0
            for i, u in enumerate(vectors):
                for j, v in enumerate(vectors):
                    if i // adapter.up.shape[1] == j // adapter.up.shape[1]:  # of one group
                        square += (u @ v - float(i == j)) ** 2
            total += square**0.5
    torch.testing.assert_close(method.penalty(parts), 0.3 * total / (2 * len(parts)))


def test_the_penalty_is_in_single_precision_under_autocast() -> None:
    method = AdaLoRA(rank=4, target_rank=2)
    parts = [(site_of(LAYERS[0]), method.build(site_of(LAYERS[0])))]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.penalty(parts), method.penalty(parts).float())
        got = method.penalty(parts)
    assert torch.equal(got, method.penalty(parts))


# budget and pruning


def test_the_budget_falls_with_the_third_power() -> None:
    """b = b_T + (b_0 − b_T)(1 − (t − t_0)/(t_1 − t_0))³ from 100 to 20 between steps 10 and 50."""
    assert [cubic_budget(t, 10, 50, 100, 20) for t in (1, 10, 50, 51, 90)] == [100, 100, 20, 20, 20]
    assert cubic_budget(30, 10, 50, 100, 20) == 30  # half way: an eighth of 80 above
    assert cubic_budget(20, 10, 50, 100, 20) == int(20 + 80 * 0.75**3)
    falling = [cubic_budget(t, 10, 50, 100, 20) for t in range(10, 51)]
    assert falling == sorted(falling, reverse=True)


def test_of_equal_scores_the_earlier_stay() -> None:
    assert largest_mask(torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]
    assert largest_mask(torch.zeros(4), 2).tolist() == [True, True, False, False]


def scored(method: AdaLoRA, scores: list[list[float]]) -> list[Any]:
    """One adapter per list, whose triplets have these scores by Ī and Ū of their λ, and no gradients."""
    parts = []
    for wanted in scores:
        adapter: Any = trained(method, site_of(LAYERS[0]))
        adapter.values_sensitivity.copy_(torch.tensor(wanted))
        adapter.values_uncertainty.fill_(1.0)
        parts.append((adapter.site, adapter))
    return parts


def zeros(parts: list[Any]) -> list[list[int]]:
    return [[i for i, value in enumerate(a.values.tolist()) if value == 0] for _, a in parts]


def test_pruning_keeps_the_most_important_triplets_of_the_whole_model() -> None:
    """20 steps: warm-up 4, final part from 15 on, pruned at every second between; the budget falls from 8 to 4."""
    method = AdaLoRA(rank=4, target_rank=2, warmup=0.2, final=0.25, every=2)
    parts = scored(method, [[9.0, 1.0, 8.0, 7.0], [2.0, 6.0, 3.0, 4.0]])
    history = []
    for step in range(1, 21):
        method.after_step(parts, step, 20)
        history.append(zeros(parts))
        with torch.no_grad():
            for _, adapter in parts:
                adapter.values.add_(1.0)  # they learn on, also where they are zero
    nothing: list[list[int]] = [[], []]
    budget = {6: 6, 8: 5, 10: 4, 12: 4, 14: 4, 15: 4}
    order = [(0, 1), (1, 0), (1, 2), (1, 3)]  # lowest score first
    for step, got in enumerate(history, 1):
        left = budget.get(min(step, 15)) if step in budget or step > 15 else None
        out = order[: 8 - left] if left else []
        assert got == [[i for k, i in sorted(out) if k == site] for site in (0, 1)] if left else got == nothing, step


def test_pruned_triplets_are_restored_by_importance_and_not_in_the_final_part() -> None:
    method = AdaLoRA(rank=4, target_rank=2, warmup=0.0, final=0.5, every=1)
    parts = scored(method, [[4.0, 3.0, 2.0, 1.0]])
    ((_, adapter),) = parts
    method.after_step(parts, 4, 10)
    assert zeros(parts) == [[2, 3]]
    adapter.values.data.fill_(1.0)
    adapter.values_sensitivity.copy_(torch.tensor([4.0, 1.0, 2.0, 3.0]))
    adapter.values.grad = torch.tensor([0.0, 1e3, 0.0, 0.0], dtype=torch.float64)  # too late for the choice
    method.after_step(parts, 5, 10)
    assert zeros(parts) == [[1, 2]]
    adapter.values.data.fill_(1.0)
    adapter.values_sensitivity.copy_(torch.tensor([1.0, 4.0, 3.0, 2.0]))
    method.after_step(parts, 6, 10)
    assert zeros(parts) == [[1, 2]]
    assert adapter.values_sensitivity.tolist() == [1.0, 4.0, 3.0, 2.0]


def test_a_sites_own_target_is_its_share_of_the_budget() -> None:
    method = AdaLoRA(rank=4, target_rank=2, final=0.5, by_site={"deep": {"target_rank": 4}})
    sites = [WeightSite(name=n, role=n, path="0", d_out=6, d_in=7) for n in ("deep", "flat")]
    parts = [(site, scored(method, [[4.0, 3.0, 2.0, 1.0]])[0][1]) for site in sites]
    method.after_step(parts, 5, 10)
    assert sum(len(z) for z in zeros(parts)) == 8 - (4 + 2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_end_at_the_target(steps: int) -> None:
    method = AdaLoRA(rank=4, target_rank=2)
    parts = scored(method, [[1.0, 2.0, 3.0, 4.0]])
    for step in range(1, steps + 1):
        method.after_step(parts, step, steps)
    assert zeros(parts) == [[0, 1]]


# whole steps against peft


class Two(nn.Module):
    """Two layers whose output has a loss, as peft's term requires."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return SimpleNamespace(loss=F.mse_loss(self.second(torch.tanh(self.first(x))), y))


def test_steps_are_those_of_peft() -> None:
    """Adam over warm-up, pruning and final part: Λ, P and Q after each step, with the term of the loss."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Two().double()
    data = [(torch.randn(8, 7, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)) for _ in range(20)]
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=4, tfinal=5, deltaT=2, beta1=0.85, beta2=0.8, orth_reg_weight=0.3, total_step=20,
        lora_alpha=8, target_modules=["first", "second"],
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.double()
    layers = {n: theirs.base_model.model.get_submodule(n) for n in ("first", "second")}
    method = AdaLoRA(
        rank=4, target_rank=2, alpha=8 * 4 / (4 + 1e-5), warmup=0.2, final=0.25, every=2, beta2=0.8, orthogonality=0.3
    )
    parts: dict[str, tuple[WeightSite, Any]] = {}
    for name, layer in layers.items():
        site = WeightSite(name=name, role=name, path=name, d_out=layer.out_features, d_in=layer.in_features)
        adapter = method.build(site).double()
        adapter.up.data.copy_(layer.lora_B["default"])
        adapter.down.data.copy_(layer.lora_A["default"])
        parts[name] = (site, adapter)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(parts["first"][1].output(x, base.first(x)))
        return F.mse_loss(parts["second"][1].output(hidden, base.second(hidden)), y) + method.penalty(parts.values())

    ours = torch.optim.Adam([p for _, a in parts.values() for p in a.parameters()], 0.02)
    # not `ranknum`, which peft's own set_adapter makes trainable: it is a number of triplets
    peers = torch.optim.Adam([p for n, p in theirs.named_parameters() if p.requires_grad and "ranknum" not in n], 0.02)
    pruned = 0
    for step, (x, y) in enumerate(data, 1):
        theirs.base_model(x, y).loss.backward()  # `theirs(x, y)` would pass over the term
        peers.step()
        theirs.base_model.update_and_allocate(step)
        peers.zero_grad()
        loss(x, y).backward()
        ours.step()
        method.after_step(parts.values(), step, 20)
        ours.zero_grad()
        for name, layer in layers.items():
            adapter = parts[name][1]
            torch.testing.assert_close(adapter.values, layer.lora_E["default"][:, 0], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(adapter.up, layer.lora_B["default"], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(adapter.down, layer.lora_A["default"], rtol=1e-6, atol=1e-9)
        pruned = sum(int((a.values == 0).sum()) for _, a in parts.values())
    assert pruned == 4


# on a model


def test_the_report_lists_the_ranks_and_a_file_holds_the_used_triplets(tmp_path: Path) -> None:
    host = hosts.get("timm_vit")()
    torch.manual_seed(0)
    model = host.tiny()["vit"]().eval()
    other, x = copy.deepcopy(model), host.sample(model)
    tuned = attach(model, "adalora", rank=4, target_rank=1, where="attn.{q,v}", final=0.0, warmup=0.0, every=1)
    assert tuned.report().summary == ""
    for p in tuned.parameters():
        p.grad = torch.randn_like(p)
        p.data.normal_()
    assert "rank: 16 of 16 triplets are not zero; on average attn.q 4.0, attn.v 4.0" in str(tuned.report())
    tuned.after_step(1, 2)
    tuned.after_step(2, 2)
    assert tuned.report().summary.startswith("rank: 4 of 16 triplets are not zero; on average attn.q ")
    path = tuned.save(tmp_path / "x")
    assert {key.rpartition(":")[2] for key in tuned.state_dict()} == set(TRAINED)
    veneer.load(other, path)
    assert torch.equal(model(**x), other(**x))
    assert attach(copy.deepcopy(host.tiny()["vit"]()), "lora").report().summary == ""


@pytest.mark.parametrize(("step", "steps"), [(0, 5), (6, 5), (-1, 5)])
def test_invalid_steps_are_rejected(step: int, steps: int) -> None:
    tuned = attach(hosts.get("timm_vit")().tiny()["vit"](), "adalora", where="attn.q")
    with raises(OptionError, where="adalora", option="step", given=step, expected=(1, 5)):
        tuned.after_step(step, steps)


@pytest.mark.parametrize(
    "options",
    [
        {"target_rank": 0},
        {"target_rank": 5, "rank": 4},
        {"warmup": 0.5, "final": 0.5},
        {"warmup": -0.1},
        {"beta1": 1.0},
        {"beta2": 0.0},
        {"every": 0},
        {"orthogonality": -1.0},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    option, given = next(iter(options.items()))
    if option in ("warmup", "final"):
        option, given = "warmup", (options.get("warmup", AdaLoRA().warmup), options.get("final", AdaLoRA().final))
    with raises(OptionError, method="adalora", option=option, given=given):
        AdaLoRA(**options)


def test_groups_must_divide_the_rank() -> None:
    with raises(OptionError, method="adalora", option="rank", given=3, expected=2):
        AdaLoRA(rank=3, target_rank=2).build(site_of(LAYERS[2]))

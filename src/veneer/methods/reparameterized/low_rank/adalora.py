"""AdaLoRA: a low-rank update as singular triplets, pruned by importance across the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.convolve import convolve
from veneer.functional.importance import PruningSchedule, largest_mask, update_importance
from veneer.functional.orthogonality import orthonormality_error
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import Site, WeightSite

TRAINED = ("up", "values", "down")


class AdaLoRAAdapter(Adapter):
    """y' = y + s·P Λ Q x, W' = W + s·P Λ Q. Triplet i is column i of P, λ_i and row i of Q.

    Shapes: `up` is P, (d_out, rank / groups[, 1, 1]), `values` is Λ, (rank,), `down` is Q, (rank, d_in / groups[, k, k]).
    Training state: Ī and Ū of each (`up_sensitivity`, `up_uncertainty`, …), and `kept`, (rank,), 0 if pruned last time.
    """

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True
    training_buffers: ClassVar[tuple[str, ...]] = (
        *(f"{n}_{what}" for n in TRAINED for what in ("sensitivity", "uncertainty")),
        "kept",
    )
    kept: Tensor

    def __init__(self, site: WeightSite, rank: int, scaling: float) -> None:
        super().__init__()
        self.site, self.scaling = site, scaling
        ones = (1,) * len(site.kernel)
        self.up = nn.Parameter(torch.empty(site.d_out, rank // site.groups, *ones))
        self.values = nn.Parameter(torch.zeros(rank))
        self.down = nn.Parameter(torch.empty(rank, site.d_in // site.groups, *site.kernel))
        for name in TRAINED:
            for what in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{name}_{what}", torch.zeros(getattr(self, name).shape), persistent=False)
        self.register_buffer("kept", torch.ones(rank), persistent=False)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the module's input; y: its output."""
        site = self.site
        low = convolve(x, self.down, site.stride, site.padding, site.dilation, site.groups)
        scale = (self.strength * self.scaling) * self.values.view(-1, *(1 for _ in site.kernel))
        return y + convolve(low * scale, self.up, groups=site.groups)

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·P Λ Q."""
        return weight + self.delta() * (self.strength * self.scaling)

    def delta(self) -> Tensor:
        """P Λ Q in the weight's shape, without scales."""
        columns, rows = self._blocks(self.up, self.down)
        values = self.values.unflatten(0, (self.site.groups, 1, -1))
        return ((columns.mT * values) @ rows).reshape(self.site.weight_shape)

    def _blocks(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of P and the rows of Q, (groups, rank / groups, width of each)."""
        columns, rows = (t.flatten(1).unflatten(0, (self.site.groups, -1)) for t in (up, down))
        return columns.mT, rows

    def unorthogonality(self) -> Tensor:
        """‖PᵀP − I‖_F + ‖QQᵀ − I‖_F, within groups."""
        columns, rows = self._blocks(self.up, self.down)
        return orthonormality_error(columns) + orthonormality_error(rows)

    def observe(self, beta1: float, beta2: float) -> None:
        """Updates the smoothed sensitivity and its uncertainty with the gradients."""
        for name in TRAINED:
            sensitivity, uncertainty = self.get_buffer(f"{name}_sensitivity"), self.get_buffer(f"{name}_uncertainty")
            update_importance(self.get_parameter(name), sensitivity, uncertainty, beta1, beta2)

    def scores(self) -> Tensor:
        """S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) with s = Ī·Ū, (rank,)."""
        up, values, down = (getattr(self, f"{n}_sensitivity") * getattr(self, f"{n}_uncertainty") for n in TRAINED)
        columns, rows = self._blocks(up, down)
        return values + columns.mean(-1).flatten() + rows.mean(-1).flatten()

    @torch.no_grad()
    def prune(self) -> None:
        """Sets λ = 0 where `kept` is 0."""
        self.values.mul_(self.kept)


@dataclass(frozen=True)
class AdaLoRA(Method):
    """W' = W + s·P Λ Q with s = alpha / rank and Λ diagonal, initialized to zero; ranks are pruned by importance.

    All sites start with `rank` triplets and end with `target_rank` on average: after the warm-up the budget of the whole
    model decreases by a cubic schedule, and λ of the triplets with the lowest importance is set to 0. Their P and Q remain, so
    that a triplet may return, until the last part of the run, in which the selection is fixed. P and Q are kept orthonormal
    by a regularization term.

    `veneer personalize` does all of this. A custom training loop adds two calls:

        loss = loss + tuned.penalty()
        loss.backward()
        optimizer.step()
        # step from 1 to steps; gradients already summed over processes
        tuned.after_step(step, steps)
        optimizer.zero_grad()

    Without them it is a LoRA of `rank` with a diagonal matrix between the factors.

    Args:
        rank: initial number of triplets per site, at least 1.
        target_rank: final average, 1 to `rank`; by site (`by_site`) the site's share of the budget.
        alpha: numerator of the scale (default: the rank, so that s = 1).
        warmup: fraction of the steps before pruning starts, 0 to 1. `final`: fraction of the steps after it has ended.
        every: steps between two prunings; between them pruned λ are trained again.
        orthogonality: weight of the orthogonality term.
        beta1: smoothing of the sensitivity, 0 to 1.
        beta2: smoothing of the sensitivity's uncertainty, 0 to 1.
    Convolutions: as in `lora`, the rank split over groups.
    Counts: rank·(d_in·k·k / groups + 1) + d_out·rank / groups per site. Pruned triplets are also stored, with λ = 0. With
    averaged weights (EMA), λ of pruned triplets is averaged as well, and decays.
    Source: Zhang et al., AdaLoRA, ICLR 2023, equations 3, 4, 6 to 11, section 3.3 and algorithm 1; QingruZhang/AdaLoRA
    `loralib/adalora.py`; peft `tuners/adalora`. Where paper and code differ, the authors' code and peft are followed, which
    agree: the term is the mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over all matrices, where the paper sums the squares; the
    sensitivity is that of the weight after its step with the gradient from before; the initial standard deviation is 0.02.
    Deviations: of equal scores the earlier triplet is kept, so that the budget is met exactly; s = alpha / rank, without the
    code's 1e-5 in the denominator; warm-up and final part are fractions of the run, not numbers of steps.
    """

    name: ClassVar[str] = "adalora"
    uses: ClassVar[tuple[str, ...]] = ("few_photos",)
    paper: ClassVar[str] = "Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, ICLR 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp")
    fallback: ClassVar[tuple[str, ...]] = ("mlp", "conv.pw")
    learning_rate: ClassVar[float] = 1e-3

    rank: int = 12
    target_rank: int = 8
    alpha: float | None = None
    warmup: float = 0.1
    final: float = 0.5
    every: int = 10
    orthogonality: float = 0.5
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if not 1 <= self.target_rank <= self.rank:
            message = f"adalora: target_rank must be from 1 to rank, got {self.target_rank} of {self.rank}"
            raise OptionError(message, option="target_rank", method=self.name, given=self.target_rank, expected=(1, self.rank))
        if not (self.warmup >= 0 and self.final >= 0 and self.warmup + self.final < 1):
            message = f"adalora: warmup and final must leave steps between them, got {self.warmup} and {self.final}"
            raise OptionError(message, option="warmup", method=self.name, given=(self.warmup, self.final))
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1 and self.every >= 1 and self.orthogonality >= 0):
            wrong = {"beta1": not 0 < self.beta1 < 1, "beta2": not 0 < self.beta2 < 1, "every": self.every < 1}
            option = next((name for name, is_wrong in wrong.items() if is_wrong), "orthogonality")
            raise OptionError(
                "adalora: beta1 and beta2 must be in (0, 1), every at least 1 and orthogonality at least 0, got "
                f"{self.beta1}, {self.beta2}, {self.every} and {self.orthogonality}",
                option=option,
                method=self.name,
                given=getattr(self, option),
            )

    def build(self, site: WeightSite) -> AdaLoRAAdapter:
        """P and Q with random values, Λ = 0, for one weight.

        Raises:
            ValueError: a grouped convolution whose groups do not divide the rank.
        """
        if self.rank % site.groups:
            message = (
                f"rank {self.rank} must be a multiple of the convolution's {site.groups} groups; set another rank at this site"
            )
            raise OptionError(message, option="rank", method=self.name, given=self.rank, expected=site.groups)
        adapter = AdaLoRAAdapter(site, self.rank, (self.alpha or self.rank) / self.rank)
        nn.init.normal_(adapter.up, std=0.02)
        nn.init.normal_(adapter.down, std=0.02)
        return adapter

    def count(self, site: WeightSite) -> int:
        """rank·(d_in·k·k / groups + d_out / groups + 1)."""
        return self.rank * (site.d_in * math.prod(site.kernel) + site.d_out) // site.groups + self.rank

    def penalty(self, adapters: Iterable[tuple[Site, Adapter]]) -> Tensor:
        """orthogonality · mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over all sites; not under autocast."""
        parts = [adapter for _, adapter in _own(adapters)]
        device = parts[0].values.device
        with torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):
            return self.orthogonality * torch.stack([a.unorthogonality().to(device) for a in parts]).sum() / (2 * len(parts))

    def after_step(self, adapters: Iterable[tuple[Site, Adapter]], step: int, steps: int) -> None:
        """Records the gradients, and prunes to the budget when due."""
        parts = list(_own(adapters))
        schedule = self._schedule(steps)
        if schedule.measures(step):
            for _, adapter in parts:
                adapter.observe(self.beta1, self.beta2)
        if schedule.prunes(step):
            first = sum(a.values.numel() for _, a in parts)
            last = sum(self._target(site) for site, _ in parts)
            self._allocate([a for _, a in parts], schedule.budget(step, first, last))
        elif step < schedule.end:
            return
        for _, adapter in parts:
            adapter.prune()

    def schedule_end(self, steps: int) -> int:
        """Step of the last pruning."""
        return self._schedule(steps).end

    def _schedule(self, steps: int) -> PruningSchedule:
        return PruningSchedule(self.warmup, self.final, self.every, steps)

    @staticmethod
    def _allocate(adapters: list[AdaLoRAAdapter], budget: int) -> None:
        """Keeps the `budget` triplets with the highest scores across all adapters."""
        device = adapters[0].values.device
        kept = largest_mask(torch.cat([a.scores().to(device) for a in adapters]), budget)
        for adapter, part in zip(adapters, kept.split([a.kept.numel() for a in adapters]), strict=True):
            adapter.kept.copy_(part)

    def _target(self, site: Site) -> int:
        here: Any = self.at(site)
        return here.target_rank

    def summary(self, adapters: Iterable[tuple[Site, Adapter]]) -> str:
        """Number of triplets with λ ≠ 0, in total and on average by role; empty before training and on `meta`."""
        parts = [(site, adapter) for site, adapter in _own(adapters) if not adapter.values.is_meta]
        counts: dict[str, list[int]] = {}
        for site, adapter in parts:
            counts.setdefault(site.role, []).append(int(torch.count_nonzero(adapter.values.detach())))
        nonzero, total = sum(map(sum, counts.values())), sum(a.values.numel() for _, a in parts)
        means = ", ".join(f"{role} {sum(n) / len(n):.1f}" for role, n in counts.items())
        return f"rank: {nonzero} of {total} triplets are not zero; on average {means}" if nonzero else ""


def _own(adapters: Iterable[tuple[Site, Adapter]]) -> Iterator[tuple[Site, AdaLoRAAdapter]]:
    for site, adapter in adapters:
        assert isinstance(adapter, AdaLoRAAdapter)
        yield site, adapter

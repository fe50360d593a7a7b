"""A bottleneck whose matrices have values at selected entries only, and scores of the entries at initialization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.functional.channels import add_channels_product, channels_product
from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.sites import BranchSite
from veneer.methods.selective.entries._entries import Entries, EntriesAdapter

MATRICES = ("down", "up")


class PrunedBottleneck(EntriesAdapter):
    """y' = y + Up(ReLU(Down(y))), whose matrices are zero except at the entries that they share with the tower.

    Args:
        bottleneck: h, width between Down and Up. `std`: standard deviation of the initial matrices.
    Attributes:
        initial_down, initial_up: initial matrices (h, width) and (width, h); None after `drop_initial`.
        down_bias, up_bias: (h,) and (width,), zero at first.
    """

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[Literal["write"]] = "write"
    initial_down: Tensor | None
    initial_up: Tensor | None

    def __init__(self, site: BranchSite, bottleneck: int, std: float) -> None:
        super().__init__()
        self.site = site
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(bottleneck)), nn.Parameter(torch.zeros(site.width))
        for name, shape in zip(MATRICES, matrix_shapes(site, bottleneck), strict=True):
            self.register_buffer(f"initial_{name}", torch.empty(shape).normal_(std=std), persistent=False)
        self.down, self.up = (
            PrunedMatrix(self, name, shape) for name, shape in zip(MATRICES, matrix_shapes(site, bottleneck), strict=True)
        )

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the branch, in the site's layout."""
        layout = self.site.layout
        z = channels_product(x, self.down.dense(), self.down_bias, layout).relu()
        return add_channels_product(y, z, self.up.dense() * self.strength, self.up_bias * self.strength, layout)

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Sets the values of the entries before a selection, which are spaced evenly."""
        if not is_init_deferred():
            self.copy_initial()

    @torch.no_grad()
    def copy_initial(self) -> None:
        """Sets the values of the entries to those of the initial matrices."""
        for matrix in (self.down, self.up):
            indices, values = self.own.part(matrix.name)
            values.copy_(matrix.initial.flatten()[indices])

    def drop_initial(self) -> None:
        """Frees the initial matrices."""
        self.initial_down = self.initial_up = None


class PrunedMatrix:
    """One matrix of a `PrunedBottleneck`.

    Attributes:
        name: of the matrix among those of the entries.
        probing: while True, `dense` is `probe`, the initial matrix with a gradient.
    """

    def __init__(self, adapter: PrunedBottleneck, side: str, shape: tuple[int, int]) -> None:
        self.adapter, self.side, self.shape = adapter, side, shape
        self.name, self.probing = f"{adapter.site.name}.{side}", False
        self.probe: Tensor | None = None

    @property
    def own(self) -> Entries:
        """The entries of all matrices of the tower."""
        return self.adapter.own

    @property
    def initial(self) -> Tensor:
        """The initial matrix."""
        return self.adapter.get_buffer(f"initial_{self.side}")

    def dense(self) -> Tensor:
        """The matrix, with zeros at the entries that are not selected."""
        if self.probing:
            if self.probe is None:
                self.probe = self.initial.clone().requires_grad_()
            return self.probe
        indices, values = self.own.part(self.name)
        return values.new_zeros(math.prod(self.shape)).index_copy(0, indices, values).view(self.shape)


def matrix_shapes(site: BranchSite, bottleneck: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of Down and Up."""
    return (bottleneck, site.width), (site.width, bottleneck)


def synflow_scores(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """|θ ∘ ∂R/∂θ| of both matrices, R the mean output of the bottleneck with |θ| and without ReLU, for an input of ones.

    Source: Tanaka et al., Pruning Neural Networks without Any Data by Iteratively Conserving Synaptic Flow, NeurIPS 2020,
    equation 2.
    """
    width = up.shape[0]
    return down.abs() * up.abs().sum(0)[:, None] / width, up.abs() * down.abs().sum(1) / width


def uniform_counts(sizes: Sequence[int], total: int) -> list[int]:
    """Numbers of entries of each matrix in proportion to its size, `total` of them."""
    return _round_to_sum([total * size / sum(sizes) for size in sizes], total)


def erdos_renyi_counts(shapes: Sequence[tuple[int, int]], total: int) -> list[int]:
    """Numbers of entries of each matrix, (n, m), in proportion to n + m, at most all of it, `total` of them.

    Source: Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity, 2018, equation 1.
    """
    counts, free = [0.0] * len(shapes), set(range(len(shapes)))
    while free:
        scale = (total - sum(counts)) / sum(sum(shapes[i]) for i in free)
        full = {i for i in free if scale * sum(shapes[i]) >= math.prod(shapes[i])}
        for i in full or free:
            counts[i] = math.prod(shapes[i]) if full else scale * sum(shapes[i])
        free = free - full if full else set()
    return _round_to_sum(counts, total)


def _round_to_sum(counts: Sequence[float], total: int) -> list[int]:
    """Whole numbers with the sum `total`: the largest fractions are rounded up."""
    whole = [math.floor(count) for count in counts]
    order = sorted(range(len(counts)), key=lambda i: whole[i] - counts[i])
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def largest_of_each(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Scores that are 1 at the `counts` largest of each matrix, and 0 elsewhere."""
    marks = []
    for score, count in zip(scores, counts, strict=True):
        flat = torch.zeros_like(score).flatten()
        flat[score.flatten().topk(count, sorted=False).indices] = 1
        marks.append(flat.view_as(score))
    return marks

"""MPO: a weight as a matrix product operator, whose central tensor is frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.quantized_weight import readable_weight
from veneer.injection.sites import WeightSite

Shape = tuple[int, int, int, int]


def split_width(width: int, tensors: int, factor: int) -> tuple[int, ...]:
    """Factors of a width, one per tensor: from both ends inwards the largest divisors up to `factor`, the rest in the middle.

    >>> split_width(768, 5, 4)
    (4, 4, 3, 4, 4)
    """
    factors, rest = [1] * tensors, width
    for place in range(tensors // 2):
        for position in (place, tensors - 1 - place):
            factors[position] = max(n for n in range(1, factor + 1) if rest % n == 0)
            rest //= factors[position]
    factors[tensors // 2] = rest
    return tuple(factors)


def tensor_shapes(rows: Sequence[int], columns: Sequence[int], bond: int | None) -> list[Shape]:
    """Shapes (d_k-1, i_k, j_k, d_k) of the tensors. A bond d is the smaller side of the matrix it divides, at most `bond`."""
    sizes = [i * j for i, j in zip(rows, columns, strict=True)]
    middle, most = len(sizes) // 2, bond or math.prod(sizes)
    bonds = [1, *(0 for _ in sizes[1:]), 1]
    for k in range(1, middle + 1):
        bonds[k] = min(bonds[k - 1] * sizes[k - 1], math.prod(sizes[k:]), most)
        bonds[-1 - k] = min(bonds[-k] * sizes[-k], math.prod(sizes[:-k]), most)
    return [(bonds[k], rows[k], columns[k], bonds[k + 1]) for k in range(len(sizes))]


class MPOAdapter(Adapter):
    """W' = W + L C R − L0 C R0, C = L0ᵀ W R0ᵀ: L and R contract the tensors before and after the central one.

    Attributes:
        auxiliary: the tensors of L and R, (d_k-1, i_k, j_k, d_k), without the central one.
        auxiliary0_k: their initial values, buffers that are saved, because a decomposition is not unique.
    """

    def __init__(self, site: WeightSite, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.site = site
        self.rows, self.columns = [s[1] for s in shapes], [s[2] for s in shapes]
        self.middle = len(shapes) // 2
        outer = [shape for k, shape in enumerate(shapes) if k != self.middle]
        self.auxiliary = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in outer)
        for k, shape in enumerate(outer):
            self.register_buffer(f"auxiliary0_{k}", torch.zeros(shape))

    def initial(self) -> list[Tensor]:
        """The tensors of L0 and R0."""
        return [self.get_buffer(f"auxiliary0_{k}") for k in range(len(self.auxiliary))]

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Decomposes the host's weight, in float32 or better: from the left up to the central tensor, and from the right."""
        weight = readable_weight(tower, self.site, "mpo")
        if weight.is_meta or is_init_deferred():
            return
        rows = weight if self.site.rows is None else weight[slice(*self.site.rows)]
        order = self._ordered(rows.to(self.auxiliary[0].dtype))
        for target, initial, tensor in zip(self.auxiliary, self.initial(), self._decompose(order), strict=True):
            target.copy_(tensor)
            initial.copy_(tensor)

    def _decompose(self, order: Tensor) -> list[Tensor]:
        """Orthonormal tensors on both sides of the central one: the largest singular vectors of one matrix after the other."""
        left: list[Tensor] = []
        right: list[Tensor] = []
        rest, middle = order, self.middle
        for tensor in self.auxiliary[:middle]:
            matrix = rest.reshape(tensor.shape[:3].numel(), -1)
            vectors = torch.linalg.svd(matrix, full_matrices=False).U[:, : tensor.shape[3]]
            left.append(vectors.reshape(tensor.shape))
            rest = vectors.mT @ matrix
        for tensor in reversed(self.auxiliary[middle:]):
            matrix = rest.reshape(-1, tensor.shape[1:].numel())
            vectors = torch.linalg.svd(matrix, full_matrices=False).Vh[: tensor.shape[0]]
            right.insert(0, vectors.reshape(tensor.shape))
            rest = matrix @ vectors.mT
        return [*left, *right]

    def _ordered(self, weight: Tensor) -> Tensor:
        """W as a vector in the order of the tensors, i_1 j_1 i_2 j_2 …"""
        n = len(self.rows)
        return weight.reshape(*self.rows, *self.columns).permute([axis for k in range(n) for axis in (k, n + k)]).reshape(-1)

    def _contract(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """L (i_1 j_1 …, d) and R (d, … i_n j_n)."""
        left, right = tensors[0].flatten(0, 2), tensors[-1].flatten(1)
        for tensor in tensors[1 : self.middle]:
            left = (left @ tensor.flatten(1)).reshape(-1, tensor.shape[3])
        for tensor in reversed(tensors[self.middle : -1]):
            right = (tensor.flatten(0, 2) @ right).reshape(tensor.shape[0], -1)
        return left, right

    def weight(self, weight: Tensor) -> Tensor:
        """W + (L C R − L0 C R0)."""
        left0, right0 = self._contract(self.initial())
        left, right = self._contract(list(self.auxiliary))
        order = self._ordered(weight.to(left.dtype)).reshape(len(left0), -1, right0.shape[1])
        central = torch.matmul(torch.einsum("ld,lmr->dmr", left0, order), right0.mT)
        change = self._product(left, central, right) - self._product(left0, central, right0)
        return weight + self._restore(change).reshape(weight.shape).to(weight.dtype)

    @staticmethod
    def _product(left: Tensor, central: Tensor, right: Tensor) -> Tensor:
        return left @ torch.matmul(central, right).flatten(1)

    def _restore(self, order: Tensor) -> Tensor:
        """Inverse of `_ordered`, (i_1 … i_n, j_1 … j_n)."""
        n = len(self.rows)
        sizes = [size for pair in zip(self.rows, self.columns, strict=True) for size in pair]
        axes = [*range(0, 2 * n, 2), *range(1, 2 * n, 2)]
        return order.reshape(sizes).permute(axes).reshape(math.prod(self.rows), math.prod(self.columns))


@dataclass(frozen=True)
class MPO(Method):
    """W' = T_1 … T_c … T_n, a chain of tensors (d_k-1, i_k, j_k, d_k): the central T_c is frozen, the auxiliary ones train.

    Rows and columns of W are split into n factors i_k and j_k. Singular value decompositions from both ends give the tensors,
    exact at the start. The central one has most entries and the singular values; it is computed from W and the initial others.

    Args:
        tensors: n, an odd number, at least 3.
        factor: largest factor of rows and columns in an auxiliary tensor, at least 2; the central one has the remaining factors.
        bond: largest bond d_k (default: no limit, an exact decomposition). A limit trains the largest singular vectors only.
    Convolutions: the kernel is flattened with the inputs, (d_out, d_in·k·k / groups). Widths without small divisors leave most
    factors to the central tensor.
    The weight is changed in every forward pass, at the cost of four products of W with L and R; quantized bases are rejected.
    Counts: Σ d_k-1·i_k·j_k·d_k of the auxiliary tensors; ViT-B/16's fused qkv, output and MLP layers 6,316,032, 131,584 each.
    Files have the initial auxiliary tensors too.
    Source: Liu et al., Enabling Lightweight Fine-tuning for Pre-trained Language Model Compression based on Matrix Product
    Operators, ACL 2021, section 3; the authors' decomposition is published as a compiled library, and as source with a later
    paper (Gao et al., ACL 2023). Deviations: with `bond` the paper drops the rest of W, which compresses the model; here the rest
    stays, so a new adapter leaves outputs unchanged. The paper leaves the singular values in the last tensor, the later code
    divides them among all tensors; here they are in the central one. The reachable weights are the same, the steps of an
    optimizer are not.
    The paper's dimension squeezing, which lowers the bonds during training, is not implemented.
    """

    name: ClassVar[str] = "mpo"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Liu et al., Enabling Lightweight Fine-tuning Based on Matrix Product Operators, ACL 2021"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp")
    learning_rate: ClassVar[float] = 1e-4

    tensors: int = 5
    factor: int = 4
    bond: int | None = None

    def __post_init__(self) -> None:
        if self.tensors < 3 or self.tensors % 2 == 0:
            raise OptionError.of(self.name, "tensors", self.tensors, "an odd number, at least 3")
        if self.factor < 2:
            raise OptionError.of(self.name, "factor", self.factor, "at least 2")
        if self.bond is not None and self.bond < 1:
            raise OptionError.of(self.name, "bond", self.bond, "at least 1")

    def _shapes(self, site: WeightSite) -> list[Shape]:
        sizes = site.weight_shape[0], math.prod(site.weight_shape[1:])
        rows, columns = (split_width(size, self.tensors, self.factor) for size in sizes)
        return tensor_shapes(rows, columns, self.bond)

    def build(self, site: WeightSite) -> MPOAdapter:
        """The auxiliary tensors of one weight, zero until it is decomposed."""
        return MPOAdapter(site, self._shapes(site))

    def count(self, site: WeightSite) -> int:
        """Entries of the auxiliary tensors."""
        return sum(math.prod(shape) for k, shape in enumerate(self._shapes(site)) if k != self.tensors // 2)

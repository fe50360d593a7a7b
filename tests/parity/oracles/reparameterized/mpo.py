"""MPO beside its authors' decomposition and contraction."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.parity.measure import Row, measure, randn
from tests.parity.models import layer, link
from tests.parity.oracle import Repository

ORACLE = Repository("zfgao66/OPF", "53797e1bc0a6246a0e02856ccd7455999b42fe8c")
METHODS = ("mpo",)


class Weight(nn.Module):
    """The adapter's weight as a module."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter: Any = adapter

    def forward(self, weight: Tensor) -> Tensor:
        weight = self.adapter.weight(weight)
        return weight


def rows() -> list[Row]:
    """A layer with three tensors and one with five, whose central ones are frozen."""
    difference = max(_difference("mlp.fc1", 3), _difference("mlp.fc2", 5))
    text = (
        "with `bond` the rest of the weight stays, which the code drops; the singular values are in the central tensor, in the "
        "code in all of them, here compared after a change of bases; the code is that of a later paper of the authors, who "
        "published that of this one as a compiled library only"
    )
    return [Row("mpo", "weights of two linear layers, gradients", difference, deviations=text)]


def _difference(name: str, tensors: int) -> float:
    ours, linear = layer("mpo", name, tensors=tensors, where="mlp.in mlp.out")
    weight, middle = linear.weight.detach(), tensors // 2
    code = ORACLE.definitions("compress_tools/Matrix2MPO.py", "MPO", random=random)
    chain = code.MPO(ours.rows, ours.columns, None)
    found = [torch.from_numpy(tensor.copy()) for tensor in chain.matrix2mpo(weight.numpy(), cutoff=False)[0]]
    outer = [tensor for k, tensor in enumerate(found) if k != middle]
    assert [tensor.shape for tensor in outer] == [tensor.shape for tensor in ours.auxiliary]
    left, right = _change_of_bases(ours, outer)
    module = Weight(ours)

    def in_our_bases(values: list[Any]) -> dict[str, Tensor]:
        changed = [*values]
        changed[middle - 1] = values[middle - 1] @ left
        changed[middle] = torch.tensordot(right, values[middle], 1)
        return {f"adapter.auxiliary.{k}": value for k, value in enumerate(changed)}

    mine = [nn.Parameter(torch.zeros_like(tensor)) for tensor in outer]
    theirs = [nn.Parameter(tensor + 0.3 * randn(*tensor.shape, seed=k)) for k, tensor in enumerate(outer)]
    return measure(
        lambda: functional_call(module, in_our_bases(mine), (weight,)),
        lambda: chain.mpo2matrix([*theirs[:middle], found[middle], *theirs[middle:]]),
        [(a, link(b)) for a, b in zip(mine, theirs, strict=True)],
    )


def _change_of_bases(ours: Any, outer: list[Tensor]) -> tuple[Tensor, Tensor]:
    """G and H with L0 = L G and R0 = H R for our L0 and R0 and the oracle's L and R, contracted before the perturbation."""
    (left0, right0), (left, right) = ours._contract(ours.initial()), ours._contract(outer)
    return torch.linalg.inv(left0.mT @ left), torch.linalg.inv(right @ right0.mT)

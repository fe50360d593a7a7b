"""Which pictures a step sees, and the loss over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from veneer.training.loop.seeds import generator

Batch = tuple[Tensor, Tensor]


class Order:
    """Sample number n of a run is picture `order[n mod N]` of epoch n // N, each epoch in an order of its own.

    Args:
        indices: the training pictures. `seed`: of the orders.
    """

    def __init__(self, indices: Sequence[int], seed: int) -> None:
        self.indices, self.seed = tuple(indices), seed
        self._orders: dict[int, list[int]] = {}

    def at(self, number: int) -> tuple[int, int]:
        """(epoch, picture) of a sample."""
        epoch, place = divmod(number, len(self.indices))
        if epoch not in self._orders:
            drawn = torch.randperm(len(self.indices), generator=generator(self.seed, "order", epoch)).tolist()
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: drawn}
        return epoch, self.indices[self._orders[epoch][place]]


class ClassifyingLoss:
    """Cross-entropy of a step's pictures.

    Args:
        logits: what gives logits for inputs (B, …): the model on pictures, or its head on features.
        inputs: `inputs([(epoch, picture), …])` gives inputs and labels.
        order: of the samples. `samples`: in a step, over all processes.
        expect: told what the next step will ask for, or None.
        smoothing: share of the target that is spread over all classes.
        device: of the model.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        inputs: Callable[[Sequence[tuple[int, int]]], Batch],
        order: Order,
        samples: int,
        expect: Callable[[Sequence[tuple[int, int]]], None] | None = None,
        smoothing: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.logits, self.inputs, self.order, self.samples = logits, inputs, order, samples
        self.expect, self.smoothing, self.device = expect, smoothing, device

    def __call__(self, step: int, rows: list[int]) -> Tensor:
        drawn, following = ([self.order.at(n * self.samples + row) for row in rows] for n in (step, step + 1))
        if self.expect is not None:
            self.expect([*drawn, *following])
        inputs, labels = self.inputs(drawn)
        logits = self.logits(inputs.to(self.device))
        return cross_entropy(logits.float(), labels.to(self.device), label_smoothing=self.smoothing)


@torch.no_grad()
def logits_of(model: nn.Module, batches: Iterable[Batch], device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """Logits and labels of all batches, on the CPU, in evaluation mode.

    Args:
        model: the classifier, or its head. `batches`: pictures (or features) and labels. `dtype`: of autocast, or None.
    """
    modes = {m: m.training for m in model.modules()}
    found: list[Tensor] = []
    truth: list[Tensor] = []
    try:
        model.eval()
        for inputs, labels in batches:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                found.append(model(inputs.to(device)).float().cpu())
            truth.append(labels)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(found), torch.cat(truth)

"""GPS: trains the inputs of each neuron with the largest gradient, and the biases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite, WeightSite
from veneer.methods.selective.tensors.norm_tuning import DeltaAdapter

from ._entries import Entries, SparseAdapter, describe, size_of
from ._scores import accumulate_gradients


@dataclass(frozen=True)
class GPS(Method):
    """W' = W + ΔW, where ΔW is nonzero at the `inputs` entries of each row with the largest |Σ_n dL_n/dW|; b' = b + db.

    A row holds the inputs of one neuron, or the flattened kernel of one filter, so every neuron of the model is adapted. The
    entries are selected once before training, from the losses of single samples. All deltas are initialized to zero; biases of
    norms stay frozen. A file has the values, their indices and db.

    Args:
        inputs: trained entries of each row, at least 1; rows with fewer inputs are trained whole.
        samples: samples for the scores, at least 1.
    Counts: inputs · rows + biases; ViT-B/16, patch embedding included, 83,712 + 83,712 = 167,424.
    Source: Zhang et al., Gradient-based Parameter Selection for Efficient Fine-Tuning, CVPR 2024, section 3, and its authors'
    code. Deviations: the gradient is that of the training loss in place of a supervised contrastive loss over two views, so it
    needs no labels and holds for diffusion; `samples` training samples in place of all; a head is trained beside. In
    convolutional networks the depthwise kernels and patch embeddings are selected by `where="conv"`.
    """

    name: ClassVar[str] = "gps"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Zhang et al., Gradient-based Parameter Selection for Efficient Fine-Tuning, CVPR 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite), Need(ParamSite, roles=("bias", "bias.*")))
    default: ClassVar[tuple[str, ...]] = (
        *("attn", "xattn", "mlp", "conv.patch", "bias.attn", "bias.xattn", "bias.mlp", "bias.conv.patch"),
        *("not:attn.norm", "not:bias.norm"),
    )
    learning_rate: ClassVar[float] = 1e-3
    selects: ClassVar[bool] = True
    shared_options: ClassVar[tuple[str, ...]] = ("samples",)

    inputs: int = 1
    samples: int = 256

    def __post_init__(self) -> None:
        if self.inputs < 1:
            raise OptionError.of(self.name, "inputs", self.inputs, "at least 1")
        if self.samples < 1:
            raise OptionError.of(self.name, "samples", self.samples, "at least 1")

    def build(self, site: WeightSite | ParamSite) -> SparseAdapter | DeltaAdapter:
        """The entries of a weight, or the delta of a bias."""
        if isinstance(site, ParamSite):
            return DeltaAdapter(site.shape)
        return SparseAdapter(entries=Entries([size_of(site)], self.count(site)))

    def select(self, adapters: Sequence[tuple[Any, Adapter]], losses: Iterable[Tensor]) -> None:
        """Selects the inputs of each row."""
        parts = [(site, adapter) for site, adapter in adapters if isinstance(adapter, SparseAdapter)]
        for (site, adapter), total in zip(
            parts, accumulate_gradients(self.name, parts, losses, self.samples, lambda g: g), strict=True
        ):
            rows = site.weight_shape[0]
            width, most = total.numel() // rows, len(adapter.own.values) // rows
            columns = total.reshape(rows, width).abs().topk(most, 1).indices
            adapter.own.select((columns + width * torch.arange(rows, device=columns.device).unsqueeze(1)).flatten())

    def count(self, site: WeightSite | ParamSite) -> int:
        """Entries of all rows, or the elements of a bias."""
        if isinstance(site, ParamSite):
            return size_of(site)
        return site.weight_shape[0] * min(self.inputs, math.prod(site.weight_shape[1:]))

    def summary(self, adapters: Iterable[tuple[Any, Adapter]]) -> str:
        """The number of selected entries."""
        return describe(adapter for _, adapter in adapters)

    @classmethod
    def examples(cls) -> tuple[GPS, GPS]:
        """With one and two inputs."""
        return cls(), cls(inputs=2)

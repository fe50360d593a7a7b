"""Masking: trains a binary mask of each weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.packed_bits import pack_bits, unpack_bits
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite

from ._entries import size_of


def _straight_through(scores: Tensor, threshold: float) -> Tensor:
    """1[s > threshold], whose gradient is passed on unchanged: s − s is 0 and has the gradient of s."""
    return (scores > threshold).to(scores.dtype) + (scores - scores.detach())


class MaskAdapter(Adapter):
    """W' = W ∘ 1[S > threshold].

    Attributes:
        scores: S, of W's shape; in checkpoints, not in files.
        bits: the mask, eight entries per byte, the first in the lowest bit; the only tensor of a file.
    """

    unsaved: ClassVar[tuple[str, ...]] = ("scores",)
    bits: Tensor

    def __init__(self, shape: tuple[int, ...], threshold: float, initial_sparsity: float) -> None:
        super().__init__()
        self.threshold = threshold
        width = 2 * threshold
        self.scores = nn.Parameter(torch.empty(*shape))
        low = threshold - initial_sparsity * width
        nn.init.uniform_(self.scores, low, low + width)
        self.register_buffer("bits", torch.zeros(-(-math.prod(shape) // 8), dtype=torch.uint8))

    def weight(self, weight: Tensor) -> Tensor:
        """W where the mask is 1, and 0 elsewhere."""
        mask: Tensor = _straight_through(self.scores, self.threshold)
        return weight * mask

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state without the scores, with the present mask."""
        with torch.no_grad():
            self.bits.copy_(pack_bits(self.scores > self.threshold))
        state = super().state_dict(*args, **kwargs)
        for key in [key for key in state if key.rpartition(".")[2] == "scores"]:
            del state[key]
        return state

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Every mask is valid."""

    @torch.no_grad()
    def after_load(self) -> None:
        """Sets scores with the loaded mask, half the threshold away from it."""
        kept = unpack_bits(self.bits, self.scores.numel()).reshape(self.scores.shape)
        self.scores.copy_(self.threshold * (0.5 + kept.to(self.scores.dtype)))


@dataclass(frozen=True)
class Mask(Method):
    """W' = W ∘ 1[S > threshold], dL/dS = dL/dW' ∘ W: the scores S are trained with a straight-through gradient.

    S is initialized uniformly in an interval of width 2 · threshold, such that the mask has `initial_sparsity` zeros. A file has
    one bit per weight and no scores; training that continues from a file gets scores of half the threshold above or below it.

    Args:
        threshold: above 0.
        initial_sparsity: expected part of zeros of a fresh mask, 0 to 1; with 0 a fresh adapter leaves the output unchanged.
    Training needs the memory of full fine-tuning, and so do the scores of a loaded file. Weight decay acts on the scores: train
    with `--weight-decay 0`, as the authors do. Select the upper blocks by `where`, as in the paper (`"attn@6:"`).
    Counts: entries of the weights; ViT-B/16's block linears 84,934,656 scores, stored in 10,616,832 bytes.
    Source: Zhao et al., Masking as an Efficient Alternative to Finetuning for Pretrained Language Models, EMNLP 2020, section 3,
    and the authors' code. Deviations: the classifier is trained beside, not masked; by default all blocks are masked; the code
    samples the scores from (−0.02, 0.03 / initial_sparsity − 0.02), an interval of width 0.6 with a sparsity of 0.05, at a
    default learning rate of 5e-3; here the width is 2 · threshold, 0.02 by default, and the learning rate lower.
    """

    name: ClassVar[str] = "mask"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Zhao et al., Masking as an Efficient Alternative to Finetuning, EMNLP 2020"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-4

    threshold: float = 0.01
    initial_sparsity: float = 0.05

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise OptionError.of(self.name, "threshold", self.threshold, "above 0")
        if not 0 <= self.initial_sparsity <= 1:
            raise OptionError.of(self.name, "initial_sparsity", self.initial_sparsity, "0 to 1")

    def build(self, site: WeightSite) -> MaskAdapter:
        """Random scores for one weight."""
        return MaskAdapter(site.weight_shape, self.threshold, self.initial_sparsity)

    def count(self, site: WeightSite) -> int:
        """Number of scores."""
        return size_of(site)

    def summary(self, adapters: Iterable[tuple[Any, Adapter]]) -> str:
        """The number of masked entries."""
        masks = [adapter for _, adapter in adapters if isinstance(adapter, MaskAdapter)]
        if any(adapter.scores.is_meta for adapter in masks):
            return ""
        zeros = sum(int((adapter.scores <= adapter.threshold).sum()) for adapter in masks)
        return f"{zeros:,} of {sum(adapter.scores.numel() for adapter in masks):,} entries masked"

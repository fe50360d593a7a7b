"""LoRA-FA: LoRA with a random, frozen A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import WeightSite

from ._low_rank import LoRAAdapter, factor_pairs
from .lora import LoRA


@dataclass(frozen=True)
class LoRAFA(Method):
    """W' = W + s·B A with s = alpha / rank, A random and frozen, B initialized to zero; only B is trained.

    Half of LoRA's trainable parameters, and the backward pass of a layer stores only A x, of `rank` features, instead of x.

    Args:
        rank: columns of B and rows of A, at least 1.
        alpha: numerator of the scale (default: the rank, so that s = 1).
    Convolutions and embeddings: as `lora`.
    A is a buffer and saved with B, because regenerating it from a seed would depend on the version of torch.
    Counts: d_out·rank / groups per site, or d_out·rank if groups do not divide the rank; ViT-B/16's q and v, rank 8: 147,456.
    Source: Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, 2023, section 3.
    Deviation: A is uniform as in LoRA's code, with variance 1 / (3·d_in), where the paper uses a normal distribution.
    peft's optimizer, which multiplies B's gradient by (A Aᵀ)⁻¹, is not in the paper's first version and not implemented.
    """

    name: ClassVar[str] = "lora_fa"
    uses: ClassVar[tuple[str, ...]] = ("few_photos",)
    paper: ClassVar[str] = "Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for LLM Fine-tuning, 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    learning_rate: ClassVar[float] = 2e-3

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of("lora_fa", "rank", self.rank, "at least 1")

    def build(self, site: WeightSite) -> LoRAAdapter:
        """LoRA's adapter with A as a buffer."""
        adapter = LoRA(rank=self.rank, alpha=self.alpha).build(site)
        down = adapter.down.detach()
        del adapter.down
        adapter.register_buffer("down", down)
        return adapter

    def count(self, site: WeightSite) -> int:
        """Number of parameters in B."""
        return site.d_out * (self.rank // factor_pairs(site, self.rank))

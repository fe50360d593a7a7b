"""Prefix-Tuning: trained keys and values before those of every attention, computed by an MLP during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._prefix import PrefixMethod


@dataclass(frozen=True)
class PrefixTuning(PrefixMethod):
    """o = softmax(q [P_k; K]ᵀ / √d) [P_v; V] for each head: p trained keys P_k and values P_v before those of every attention.

    During training [P_k, P_v] = W_o tanh(W E + b) + b_o, with a table E (p, width) and a hidden layer W that all attention
    modules share, and one output layer for each. After training only P_k and P_v are saved. Queries and the length of sequences
    are unchanged; every query attends to the p keys, also in causal text towers. P_k enters after norms and rotations of keys.

    Args:
        tokens: p, prefix length (virtual tokens): trained keys and values of each attention module, at least 1.
        hidden: width of the hidden layer of the MLP that computes P_k and P_v during training; 0 trains them directly, without
            it.
        dropout: dropout probability of P_k and P_v, 0 to 1.
    In a training loop of your own: `attachment.finalize()` after the last step replaces the MLP by its result.
    Counts: 2·p·width per attention module after training; ViT-B/16 184,320. During training 2·width·(hidden + 1) per attention
    module and p·width + (width + 1)·hidden once, with the width of the widest attention; ViT-B/16 with p = 30 and hidden 512
    9,872,384, with hidden 800 15,402,272.
    Supports attention modules that call `F.scaled_dot_product_attention` once; Mochi calls it for each sample. timm's Swin calls
    it while the method is attached, Swin v2 and linear attention do not. The strength s multiplies the attention weights of the
    keys before they are normalized.
    Source: Li, Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, ACL 2021, equations 2 and 3, section 4.3; E is
    N(0, 1), layers as torch's Linear. Deviations: P_k and P_v trained directly are N(0, 0.02²), not N(0, 1), whose keys take most
    of the attention of a vision model; the learning rate is ours.
    """

    name: ClassVar[str] = "prefix_tuning"
    uses: ClassVar[tuple[str, ...]] = ("classification", "style")
    paper: ClassVar[str] = "Li, Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, ACL 2021"
    learning_rate: ClassVar[float] = 1e-3

    tokens: int = 10
    hidden: int = 512
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.check_prefix_options()

    @classmethod
    def examples(cls) -> tuple[PrefixTuning, PrefixTuning]:
        """With a small MLP, and without."""
        return cls(tokens=3, hidden=8), cls(tokens=2, hidden=0)

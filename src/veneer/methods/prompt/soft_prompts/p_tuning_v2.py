"""P-Tuning v2: deep prompts as trained keys and values of every attention, without an MLP unless it is enabled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._prefix import PrefixMethod


@dataclass(frozen=True)
class PTuningV2(PrefixMethod):
    """o = softmax(q [P_k; K]ᵀ / √d) [P_v; V] for each head: `prefix_tuning` with P_k and P_v trained directly.

    With `hidden`, the same MLP as that of `prefix_tuning` computes P_k and P_v during training. Not the same as deep `vpt`, whose
    p prompts of each block are tokens: they also have queries and pass the MLP, and their keys are computed by the block.

    Args:
        tokens: p, trained keys of each attention module, at least 1.
        hidden: width of the hidden layer of the MLP; 0 trains P_k and P_v directly.
        dropout: dropout probability of P_k and P_v, 0 to 1.
    In a training loop of your own with `hidden`: `attachment.finalize()` after the last step replaces the MLP by its result.
    Counts: 2·p·width per attention module; ViT-B/16 73,728 with p = 4 and 2,359,296 with p = 128. With `hidden`, during training,
    the counts of `prefix_tuning`.
    Supports the attention modules that `prefix_tuning` supports, with its strength.
    Source: Liu et al., P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks, ACL 2022,
    section 3.2, and the authors' code: p = 4, dropout 0.1, hidden 512 if enabled, and the learning rate of its RTE script.
    Deviations: P_k and P_v trained directly are N(0, 0.02²), in the code N(0, 1); all samples of a batch have the same dropout,
    in the code each its own; the head is that of the model.
    """

    name: ClassVar[str] = "p_tuning_v2"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Liu et al., P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally, ACL 2022"
    learning_rate: ClassVar[float] = 5e-3

    tokens: int = 4
    hidden: int = 0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        self.check_prefix_options()

    @classmethod
    def examples(cls) -> tuple[PTuningV2, PTuningV2]:
        """Without the MLP, and with a small one."""
        return cls(), cls(tokens=2, hidden=8)

"""MAM adapter: trained keys and values in every attention, and a scaled bottleneck parallel to every MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite, WeightSite
from veneer.methods.additive.bottleneck._bottleneck import Bottleneck, check_bottleneck_options, count_bottleneck
from veneer.methods.prompt.soft_prompts._prefix import PrefixMethod

from ._prefix_part import PrefixPartMethod


class ParallelBottleneck(Bottleneck):
    """y' = y + s·Up(Drop(ReLU(Down(x)))): x the input of the MLP, y its output."""

    input_port: ClassVar[Literal["inner"]] = "inner"


@dataclass(frozen=True)
class MAM(PrefixPartMethod):
    """o = softmax(q [P_k; K]ᵀ / √d) [P_v; V] in every attention, and y' = y + s·Up(Drop(ReLU(Down(x)))) for every MLP y(x).

    P_k and P_v are those of `prefix_tuning`: computed by an MLP during training, of which only they are saved. x is the input of
    the MLP, after its norm, where `adaptformer` reads the stream before the norm. Up is initialized to zero. On models without
    softmax attention, such as Swin v2, only the MLPs are adapted.

    Args:
        tokens: p, prefix length (virtual tokens): trained keys and values of each attention module, at least 1.
        hidden: width of the hidden layer of the MLP that computes P_k and P_v during training; 0 trains them directly, without
            it.
        bottleneck: h, bottleneck width between Down and Up, at least 1.
        scale: s, factor of the adapter of the MLP; not trained.
        dropout: dropout probability of P_k, P_v and the h features in training, 0 to 1.
    In a training loop of your own: `attachment.finalize()` after the last step replaces the MLP of the keys by its result.
    Counts: 2·p·width per attention module after training, and 2·width·h + h + width per MLP; ViT-B/16 1,373,952. During training
    those of `prefix_tuning` instead of 2·p·width.
    Supports the attention modules that `prefix_tuning` supports, with its strength.
    Source: He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022, section 4.6, and the authors'
    code: Down Kaiming-uniform with a = sqrt 5, Up and biases zero, no norm in the adapter. Deviations: p = 10 and h = 64, where
    the code has 30 and 512 for BART; s = 0.1 as in `adaptformer`, where the code has 4 for BART; a hidden layer of 512 instead
    of 800; one table and hidden layer for all attention modules, where the code has one for each of BART's three kinds. If a
    host has a gate after the branch, y is taken before the gate. In T5 and PRX, x is the stream before the norm.
    """

    name: ClassVar[str] = "mam"
    uses: ClassVar[tuple[str, ...]] = ("classification", "style")
    paper: ClassVar[str] = "He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022"
    needs: ClassVar[tuple[Need, ...]] = (*PrefixMethod.needs, Need(BranchSite, roles=("mlp",)))
    default: ClassVar[tuple[str, ...]] = ("attn.out", "xattn.out", "mlp")
    learning_rate: ClassVar[float] = 1e-3

    tokens: int = 10
    hidden: int = 512
    bottleneck: int = 64
    scale: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.check_prefix_options()
        check_bottleneck_options(self.name, self.bottleneck)

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """With a small MLP of the keys and values, and without."""
        return cls(tokens=3, hidden=8, bottleneck=8), cls(tokens=2, hidden=0, bottleneck=8)

    def changes_at_start(self, site: WeightSite | BranchSite) -> bool:
        """True for attention; Up is zero."""
        return isinstance(site, WeightSite)

    def build(self, site: WeightSite | BranchSite) -> Adapter:  # type: ignore[override]
        """Keys and values of one attention module, or Down and Up for one MLP."""
        if isinstance(site, WeightSite):
            return super().build(site)
        adapter = ParallelBottleneck(site, self.bottleneck, "relu", self.scale, self.dropout)
        nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5))
        return adapter

    def count(self, site: WeightSite | BranchSite) -> int:
        """Those of `prefix_tuning`, or 2·width·h + h + width."""
        return super().count(site) if isinstance(site, WeightSite) else count_bottleneck(site.width, self.bottleneck)

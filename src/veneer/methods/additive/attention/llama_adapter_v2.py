"""LLaMA-Adapter V2: gated attention to prompts, a bias and a scale of every linear layer, and trained norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from veneer.functional.channel_scale import scale_features
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.attention_sites import AttentionSite, SelfAttentionSite
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite, WeightSite
from veneer.methods.selective.tensors.norm_tuning import DeltaAdapter

from .llama_adapter import PromptAttention, prompt_width

NORMS = ("norm", "bias.norm")
LINEAR = ("attn.*", "xattn.*", "mlp.*")


class ScaledLinear(Adapter):
    """y' = s ∘ y with s = 1 + `gain` (d_out,): for weights that are read and have no bias."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.gain = nn.Parameter(zeros(site.d_out))

    def weight(self, weight: Tensor) -> Tensor:
        """diag(s) W."""
        return weight * (1 + self.gain * self.strength)[:, None]


class ScaledBiasedLinear(ScaledLinear):
    """y' = s ∘ (y + b), which is W' = diag(s) W and a bias s ∘ (b₀ + b). `shift`: b (d_out,)."""

    def __init__(self, site: WeightSite) -> None:
        super().__init__(site)
        self.shift = nn.Parameter(zeros(site.d_out))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: the layer's output, including its bias."""
        return scale_features(y, 1 + self.gain * self.strength, self._change(), False)

    def bias(self, bias: Tensor, weight: object) -> Tensor:
        """s ∘ (b₀ + b)."""
        return bias * (1 + self.gain * self.strength) + self._change()

    def _change(self) -> Tensor:
        """s ∘ b at strength 1; in proportion to the strength, as the blend is."""
        return (1 + self.gain) * self.shift * self.strength


@dataclass(frozen=True)
class LLaMAAdapterV2(Method):
    """`llama_adapter`, y = s ∘ (W x + b₀ + b) in the linear layers of the blocks, and trained scales and shifts of their norms.

    s is one and b zero initially, and gates are zero: a new adapter leaves the output unchanged. At first all but the prompts
    have gradients.

    Args:
        tokens: p, prompts of each attention module, at least 1.
    Norms are those of `norm_tuning`. A weight that is read and has no bias, such as BEiT's key, is scaled only. Scales, biases
    and norms can be merged, prompts cannot; `where="mlp attn.qkv attn.out norm bias.norm"` leaves the prompts out. The authors
    train prompts and gates on one set of data, and the others on another one: attach and train `llama_adapter` and this
    selection in turn.
    Counts: p·width + heads per attention, 2·d_out per linear layer, d_out if scaled only, the elements of the norms; ViT-B/16
    295,056, of which 92,304 are prompts and gates, 165,888 scales and biases, 36,864 norms.
    Source: Gao et al., LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model, 2023, equations 1 and 2, and the authors'
    code. Deviations: the code for 65B scales the input of a layer, that for images has no scale and no biases of keys and values;
    this is the paper's equation. Norms are deltas on a frozen base. Not included: early fusion, where features of an image are
    added to the prompts of a language model, because these models have no second input, and experts for captions and text.
    """

    name: ClassVar[str] = "llama_adapter_v2"
    uses: ClassVar[tuple[str, ...]] = ("classification", "style")
    paper: ClassVar[str] = "Gao et al., LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model, 2023"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(AttentionSite, where={"plain": True}),
        Need(SelfAttentionSite),
        Need(WeightSite, roles=LINEAR, where={"kind": "linear", "fused": False}),
        Need(WeightSite, roles=LINEAR, where={"kind": "linear", "fused": True, "called": True}),
        Need(ParamSite, roles=NORMS),
    )
    default: ClassVar[tuple[str, ...]] = (
        "attn.processor", "attn.module", "attn.qkv", "attn", "xattn", "mlp.in_gate", "mlp", "norm@0:", "bias.norm@0:",
    )  # fmt: skip
    fallback: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 1e-3

    tokens: int = 10

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise OptionError.of(self.name, "tokens", self.tokens, "at least 1")

    def build(self, site: AttentionSite | SelfAttentionSite | WeightSite | ParamSite) -> Adapter:
        """Prompts and gates, a scale and a bias, or a delta of a norm's tensor."""
        if isinstance(site, ParamSite):
            return DeltaAdapter(site.shape)
        if isinstance(site, WeightSite):
            return ScaledBiasedLinear(site) if site.called or site.bias else ScaledLinear(site)
        return PromptAttention(site, self.tokens)

    def count(self, site: AttentionSite | SelfAttentionSite | WeightSite | ParamSite) -> int:
        """p·width + heads, 2·d_out or d_out, or the elements of the tensor."""
        if isinstance(site, ParamSite):
            return math.prod(site.shape)
        if isinstance(site, WeightSite):
            return site.d_out * (2 if site.called or site.bias else 1)
        return self.tokens * prompt_width(site) + site.heads

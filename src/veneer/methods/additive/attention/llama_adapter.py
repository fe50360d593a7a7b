"""LLaMA-Adapter: gated attention to prompts, which is zero initially, beside the attention of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.attention_sites import AttentionSite, SelfAttentionSite
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need


class PromptAttention(Adapter):
    """o' = o + tanh(g) Attn(q, P W_k, P W_v) for each head. `prompt`: P (tokens, width); `gate`: g (heads,)."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: AttentionSite | SelfAttentionSite, tokens: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(tokens, prompt_width(site)))
        self.gate = nn.Parameter(zeros(site.heads))

    def attend(self, inner: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's attention plus that to the prompts: `to_out` is linear, so that it may be applied to both separately."""
        before = inner(attn, hidden_states, *args, **kwargs)
        y = before[0] if isinstance(before, tuple) else before
        attended, out = self._attend_to_prompts(attn, hidden_states), attn.to_out[0]
        change = out(attended) - out(attended.new_zeros(attended[:, :1].shape))
        after = y + (change / attn.rescale_output_factor).to(y.dtype)
        return (after, *before[1:]) if isinstance(before, tuple) else after

    def _attend_to_prompts(self, attn: Any, hidden_states: Tensor) -> Tensor:
        """tanh(g) Attn(q, P W_k, P W_v) with the projections of the host, (batch, length, width)."""
        prompt = self.prompt.to(hidden_states.dtype).expand(len(hidden_states), -1, -1)  # other adapters change W_k by batch row
        q, k, v = attn.to_q(hidden_states), attn.to_k(prompt), attn.to_v(prompt)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        q, k, v = (x.unflatten(-1, (len(self.gate), -1)).transpose(1, 2) for x in (q, k, v))
        gate = (self.gate.tanh() * self.strength).to(q.dtype)
        return (gate[:, None, None] * scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)


def prompt_width(site: AttentionSite | SelfAttentionSite) -> int:
    """Width of the tokens that keys and values are computed from."""
    return site.context_width if isinstance(site, AttentionSite) and site.cross else site.width


@dataclass(frozen=True)
class LLaMAAdapter(Method):
    """o = softmax(q Kᵀ / √d) V + tanh(g) softmax(q K_Pᵀ / √d) V_P: attention to p prompts P, gated by one g for each head.

    K_P = W_k P and V_P = W_v P with the frozen projections of the block, and their biases. Both softmaxes are separate, and g is
    zero initially: a new adapter leaves the output unchanged. At first only the gates have gradients, after a step all have.

    Args:
        tokens: p, prompts of each attention module, at least 1.
    Supports the attention modules of diffusers whose queries are not rotated or normalized by head, and self-attention without
    rotated queries of timm, open_clip and transformers, in towers of CLIP for images and texts: all tokens of a text read the
    prompts. `where="attn.module@2:"` (`attn.processor` in diffusers) adapts the later blocks alone, as the authors do;
    cross-attention is `xattn.processor`.
    Counts: p·width + heads per attention module; ViT-B/16 92,304.
    Source: Zhang et al., LLaMA-Adapter: Efficient Fine-tuning of Large Language Models with Zero-initialized Attention, ICLR
    2024, and the authors' code; prompts N(0, 1). Deviations: no position embedding of the queries, which these models do not
    have; in a host with linear attention, the attention to prompts still has a softmax. The scales and biases of version 2 are
    `llama_adapter_v2`; its fusion with an image is not included.
    """

    name: ClassVar[str] = "llama_adapter"
    uses: ClassVar[tuple[str, ...]] = ("style", "smallest_file")
    paper: ClassVar[str] = "Zhang et al., LLaMA-Adapter: Efficient Fine-tuning with Zero-initialized Attention, ICLR 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(AttentionSite, where={"plain": True}), Need(SelfAttentionSite))
    default: ClassVar[tuple[str, ...]] = ("attn.processor", "attn.module")
    fallback: ClassVar[tuple[str, ...]] = ("xattn.processor",)
    learning_rate: ClassVar[float] = 1e-3

    tokens: int = 10

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise OptionError.of(self.name, "tokens", self.tokens, "at least 1")

    def build(self, site: AttentionSite | SelfAttentionSite) -> PromptAttention:
        """P and g of one attention module."""
        return PromptAttention(site, self.tokens)

    def count(self, site: AttentionSite | SelfAttentionSite) -> int:
        """p·width + heads."""
        return self.tokens * prompt_width(site) + site.heads

"""LoRA-Sparse: each query reads the keys with the highest low-rank scores, which are trained to the order of the exact ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.attention_sites import AttentionSite, SelfAttentionSite
from veneer.injection.errors import OptionError, StateError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import Site


class KeyPredictor(Adapter):
    """ŝ = (A_q x)(A_k x)ᵀ / √r for each head. `query`, `key`: A_q and A_k, both (heads·r, width)."""

    chooses: ClassVar[bool] = True

    def __init__(self, site: AttentionSite | SelfAttentionSite, rank: int, keep: float) -> None:
        super().__init__()
        self.heads, self.rank, self.keep = site.heads, rank, keep
        self.query, self.key = (nn.Parameter(torch.randn(site.heads * rank, site.width) / site.width**0.5) for _ in range(2))

    def scores(self, x: Tensor) -> Tensor:
        """ŝ (batch, heads, tokens, tokens) of tokens (batch, tokens, width)."""
        q, k = (F.linear(x, a).unflatten(-1, (self.heads, self.rank)).transpose(-3, -2) for a in (self.query, self.key))
        return q @ k.mT * self.rank**-0.5

    def choose(self, x: Tensor, mask: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """True for the keys with the highest scores of each query; in training mode, it also records the order-mimic loss."""
        scores = self.scores(x.detach()) + mask.detach().to(x.dtype)
        if self.training and torch.is_grad_enabled() and self.query.requires_grad:
            self._record(order_loss(exact(), scores))
        scores = scores.detach()
        count = max(1, math.ceil(self.keep * scores.shape[-1] - 1e-9))  # 0.07·100 is a little more than 7
        best = scores.topk(count, -1).indices
        return torch.zeros_like(scores).scatter(-1, best, 1.0) > 0

    def _record(self, loss: Tensor) -> None:
        """Keeps the loss, unless a backward pass recomputes a block for gradient checkpointing."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.call.prepared = loss

    def take_loss(self) -> Tensor | None:
        """The recorded loss (), once; None if no forward pass in training mode has recorded one."""
        loss: Tensor | None = self.call.prepared
        self.call.prepared = None
        return loss


def order_loss(exact: Tensor, scores: Tensor) -> Tensor:
    """Mean over queries of KL(softmax(exact) ‖ softmax(scores)), (): ListNet's loss without its constant entropy.

    Queries that read no key, such as those of padding, count as 0.
    """
    lowest = torch.finfo(exact.dtype).min  # instead of -inf, with which a query that reads no key would give NaN
    target, predicted = exact.clamp(min=lowest).softmax(-1), scores.to(exact.dtype).clamp(min=lowest).log_softmax(-1)
    return F.kl_div(predicted, target, reduction="none").sum(-1).mean()


@dataclass(frozen=True)
class LoRASparse(Method):
    """o = softmax(q K_Tᵀ / √d) V_T: T are, for each query and head, the keep·n keys with the highest ŝ = (A_q x)(A_k x)ᵀ / √r.

    x, n tokens, is what the attention module reads. The exact scores s = q Kᵀ / √d are computed for the keys in T only. A_q and
    A_k are trained by the order-mimic loss weight·mean KL(softmax(s) ‖ softmax(ŝ)) with s of all keys as constants; the loss of
    the task does not reach them, because T is a choice. So the method learns what attention may leave out and no task: combine
    it with another method or a head. Masks and relative positions are added to both scores.

    Args:
        rank: r, rank of the scores of each head, at least 1.
        keep: share of the keys that a query reads, above 0 to 1, rounded up; at 1 the output is the host's.
        order_weight: weight of the order-mimic loss, above 0.
    In a training loop of your own: add `attachment.penalty()` to the loss after each forward pass in training mode; it has the
    loss of the last one.
    Supports self-attention of timm, open_clip, transformers and UNets that calls `F.scaled_dot_product_attention` with the
    module's tokens as queries and keys. Keys are left out by a mask: this library's forward pass takes the time of full
    attention and of ŝ; less time needs a sparse kernel, which PyTorch does not have. Strength 0 to 1 is the share by which the
    attention weights of the other keys are reduced. Beside other methods, ŝ reads the tokens that they have changed; attach those
    that add keys, such as `prefix_tuning`, first.
    Counts: 2·width·heads·r per attention module; ViT-B/16 1,769,472.
    Source: Song et al., Low-Rank Approximation for Sparse Attention in Multi-Modal LLMs, CVPR 2024: low-rank projections of
    queries and keys, top keys, order-mimic training. No code is public, and the paper's loss, rank and share were not available
    in detail: the loss is ListNet's (Cao et al., ICML 2007), the cross-entropy of top-one probabilities; rank, share,
    initialization N(0, 1 / width) and learning rate are ours. Deviation: the authors also train the weights of the model.
    """

    name: ClassVar[str] = "lora_sparse"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Song et al., Low-Rank Approximation for Sparse Attention in Multi-Modal LLMs, CVPR 2024"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(AttentionSite, where={"sdpa": True}),
        Need(SelfAttentionSite, where={"sdpa": True}),
    )
    default: ClassVar[tuple[str, ...]] = ("attn.processor", "attn.module")
    fallback: ClassVar[tuple[str, ...]] = ()
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    shared_options: ClassVar[tuple[str, ...]] = ("order_weight",)

    rank: int = 8
    keep: float = 0.5
    order_weight: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "rank": (self.rank >= 1, "at least 1"),
            "keep": (0 < self.keep <= 1, "above 0 and at most 1"),
            "order_weight": (self.order_weight > 0, "above 0"),
        }
        OptionError.check(self, checks)

    @classmethod
    def examples(cls) -> tuple[LoRASparse, LoRASparse]:
        """For few tokens."""
        return cls(rank=1, keep=0.1), cls(rank=3, keep=0.3)

    def build(self, site: AttentionSite | SelfAttentionSite) -> KeyPredictor:
        """A_q and A_k of one attention module."""
        return KeyPredictor(site, self.rank, self.keep)

    def count(self, site: AttentionSite | SelfAttentionSite) -> int:
        """2·width·heads·r."""
        return 2 * site.width * site.heads * self.rank

    def penalty(self, adapters: Iterable[tuple[Site, Any]]) -> Tensor | None:
        """weight·mean over attention modules of the order-mimic loss; None if nothing is trained or the strength is 0.

        Raises:
            StateError: no forward pass in training mode has recorded it.
        """
        trained = [(site, a) for site, a in adapters if a.query.requires_grad]
        losses = [loss for _, adapter in trained if (loss := adapter.take_loss()) is not None]
        if not losses and any(adapter.strength > 0 for _, adapter in trained):
            where = trained[0][0].name
            message = (
                f"{self.name}: no attention from {where} on has recorded the order-mimic loss: run a forward pass with autograd "
                "in training mode first, and choose gradient checkpointing with use_reentrant=False."
            )
            raise StateError(message, where=where, given="no loss", expected="a forward pass with autograd")
        return self.order_weight * torch.stack(losses).mean() if losses else None

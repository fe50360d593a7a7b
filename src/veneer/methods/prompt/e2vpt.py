"""E2VPT: prompts among the tokens and among keys and values, with pruning of prompts and of segments of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from veneer.functional.importance import largest_mask
from veneer.injection.attention_sites import SelfAttentionSite
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import Site, TokenSite

from .vpt import VPTAdapter


class PrunedPrompts(VPTAdapter):
    """Prompts among the tokens. `prompt` (tokens, width).

    Training state: importance `token_scores` (tokens,) and `segment_scores` (tokens, segments), `kept_tokens` and `kept_segments`
    of the same shapes, 0 for what is pruned, and `first`, the initial prompts.
    """

    training_buffers: ClassVar[tuple[str, ...]] = ("token_scores", "segment_scores", "kept_tokens", "kept_segments", "first")
    token_scores: Tensor
    segment_scores: Tensor
    kept_tokens: Tensor
    kept_segments: Tensor
    first: Tensor

    def __init__(self, site: TokenSite, tokens: int, segments: int, dropout: float) -> None:
        super().__init__(site, tokens, 0, dropout)
        height, depth, channels = site.patch
        bound = math.sqrt(6 / (channels * height * depth + site.width))
        nn.init.uniform_(self.prompt, -bound, bound)
        shape = (tokens, segments)
        for name, start in (("scores", torch.zeros), ("kept", torch.ones)):
            self.register_buffer(_buffer("token", name), start(tokens), persistent=False)
            self.register_buffer(_buffer("segment", name), start(shape), persistent=False)
        self.register_buffer("first", self.prompt.detach().clone(), persistent=False)

    @torch.no_grad()
    def sensitivity(self) -> Tensor:
        """∂L/∂m of a mask m of ones on the segments, (tokens, segments): the sum of p · ∂L/∂p over the channels of a segment."""
        tokens, segments = self.segment_scores.shape
        grad = self.prompt.grad
        product = torch.zeros_like(self.prompt) if grad is None else self.prompt * grad
        return product.view(tokens, -1, segments).sum(1)

    @torch.no_grad()
    def prune(self) -> None:
        """Sets what is pruned to zero."""
        width = self.prompt.shape[1]
        segments = self.kept_segments.repeat(1, width // self.kept_segments.shape[1])
        self.prompt.mul_(self.kept_tokens[:, None] * segments)

    @torch.no_grad()
    def rewind(self) -> None:
        """Sets the prompts to their initial values."""
        self.prompt.copy_(self.first)


def _buffer(of: str, name: str) -> str:
    return f"{of}_scores" if name == "scores" else f"kept_{of}s"


class KeyValuePrompts(Adapter):
    """The same prompts among keys and among values. `prompt` (heads, n, channels of a head)."""

    training_buffers: ClassVar[tuple[str, ...]] = ("first",)
    first: Tensor

    def __init__(self, site: SelfAttentionSite, prompts: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(site.heads, prompts, site.out.d_in // site.heads))
        nn.init.kaiming_uniform_(self.prompt, a=0)
        self.register_buffer("first", self.prompt.detach().clone(), persistent=False)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values, which are equal."""
        return self.prompt, self.prompt

    @torch.no_grad()
    def rewind(self) -> None:
        """Sets the prompts to their initial values."""
        self.prompt.copy_(self.first)


@dataclass(frozen=True)
class E2VPT(Method):
    """[x', _, E'] = L([x, P, E]) with attention softmax(q [K_P; K]ᵀ / √d) [V_P; V] in block L, where K_P = V_P are trained, too.

    Prompts P are those of deep VPT. After a part of the steps the least important prompts, and then segments of prompts, become
    zero, the others return to their initial values, and training continues: `veneer transfer` does so by itself, and a custom
    training loop calls `tuned.after_step(step, steps)` after each step, else nothing is pruned, and `tuned.finalize()` after
    EMA. Importance is the mean of |∂L/∂m| over the steps, m a mask of ones on a prompt or on a segment of it, the same in all
    blocks.

    Args:
        tokens: prompts P of each block, at least 1. `key_values`: prompts K_P of each attention, at least 1.
        dropout: dropout probability of P in training, 0 to 1.
        keep: share of the prompts P that remains, above 0 to 1, at least one of them. `keep_segments`: share of the segments of
            each prompt that remains, above 0 to 1, at least one. With 1 and 1 nothing is pruned and nothing returns.
        segments: number of segments of a prompt, a divisor of the width; segment i has the channels c with c mod segments = i.
        prune_at: fraction of the steps before the pruning, above 0 to 1.
    Where attention has no such site (`attn.module`), normalizes its keys or does not call `F.scaled_dot_product_attention`,
    only P is trained; rotary positions, windows and masks are not supported.
    Counts: tokens·width + key_values·width per block; ViT-B/16 with 10 and 5 prompts 138,240. Pruned values are counted.
    Source: Han et al., E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning, ICCV 2023, and the authors' code
    (ChengHan111/E2VPT): keys and values share one parameter, Kaiming-uniform; segments are interleaved channels; P as VPT.
    Deviations: the authors train twice, from the same initial values, and choose the shares among 10 to 90 % on validation data;
    here it is one run, whose optimizer is not reset, and fixed shares. Their importance is the mean of ∂L/∂m with its sign,
    over the data after training; their masks are trained in the first run. The least number of segments is 1, not 4.
    """

    name: ClassVar[str] = "e2vpt"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Han et al., E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning, ICCV 2023"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(TokenSite, where={"can_insert": True}),
        Need(SelfAttentionSite, where={"can_extend": True}),
    )
    default: ClassVar[tuple[str, ...]] = ("tokens.block", "attn.module")
    fallback: ClassVar[tuple[str, ...]] = ()
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2
    shared_options: ClassVar[tuple[str, ...]] = ("tokens", "keep", "keep_segments", "segments", "prune_at")

    tokens: int = 10
    key_values: int = 5
    dropout: float = 0.1
    keep: float = 0.5
    keep_segments: float = 0.5
    segments: int = 16
    prune_at: float = 0.5

    def __post_init__(self) -> None:
        checks = {
            **{option: (getattr(self, option) >= 1, "at least 1") for option in ("tokens", "key_values", "segments")},
            **{o: (0 < getattr(self, o) <= 1, "above 0 and at most 1") for o in ("keep", "keep_segments", "prune_at")},
            "dropout": (0 <= self.dropout < 1, "in [0, 1)"),
        }
        OptionError.check(self, checks)

    @classmethod
    def examples(cls) -> tuple[E2VPT, E2VPT]:
        """Few segments, for narrow models."""
        return cls(segments=4), cls(segments=4)

    def build(self, site: TokenSite | SelfAttentionSite) -> Adapter:
        """P of a token sequence, or K_P of an attention.

        Raises:
            OptionError: `segments` does not divide the width of the tokens.
        """
        if isinstance(site, SelfAttentionSite):
            return KeyValuePrompts(site, self.key_values)
        if site.width % self.segments:
            raise OptionError.of(self.name, "segments", self.segments, f"a divisor of the width {site.width}")
        return PrunedPrompts(site, self.tokens, self.segments, self.dropout)

    def count(self, site: TokenSite | SelfAttentionSite) -> int:
        """tokens·width, or key_values·channels of all heads."""
        return self.key_values * site.out.d_in if isinstance(site, SelfAttentionSite) else self.tokens * site.width

    @property
    def _prunes(self) -> bool:
        return self.keep < 1 or self.keep_segments < 1

    def schedule_end(self, steps: int) -> int:
        """Step of the pruning."""
        return max(1, round(self.prune_at * steps)) if self._prunes else 0

    def after_step(self, adapters: Iterable[tuple[Site, Any]], step: int, steps: int) -> None:
        """Adds to the importance of prompts and segments; prunes and rewinds when due; then keeps what is pruned at zero."""
        if not self._prunes:
            return
        every = [adapter for _, adapter in adapters]
        prompts, due = list(_prompts(every)), self.schedule_end(steps)
        if prompts and step <= due:
            self._measure(prompts)
        if step == due:
            self._select(prompts)
            for adapter in every:
                adapter.rewind()
        if step >= due:
            for layer in prompts:
                layer.prune()

    @staticmethod
    def _measure(prompts: list[PrunedPrompts]) -> None:
        segments = torch.stack([layer.sensitivity().cpu() for layer in prompts]).sum(0)
        for layer in prompts:
            layer.segment_scores.add_(segments.abs().to(layer.segment_scores))
            layer.token_scores.add_(segments.sum(1).abs().to(layer.token_scores))

    def _select(self, prompts: list[PrunedPrompts]) -> None:
        """Keeps the most important prompts and segments."""
        tokens, segments = max(1, round(self.keep * self.tokens)), max(1, round(self.keep_segments * self.segments))
        for layer in prompts:
            layer.kept_tokens.copy_(largest_mask(layer.token_scores, tokens))
            layer.kept_segments.copy_(torch.stack([largest_mask(scores, segments) for scores in layer.segment_scores]))

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Sets what is pruned to zero, which averaged weights (EMA) are not."""
        for layer in _prompts(adapter for _, adapter in adapters):
            layer.prune()
        return self

    def summary(self, adapters: Iterable[tuple[Site, Any]]) -> str:
        """How many prompts of all blocks are zero."""
        layers = [layer for layer in _prompts(adapter for _, adapter in adapters) if not layer.prompt.is_meta]
        prompts = [prompt for layer in layers for prompt in layer.prompt]
        return f"{sum(not prompt.any() for prompt in prompts)} of {len(prompts)} prompts are zero" if prompts else ""


def _prompts(adapters: Iterable[Any]) -> Iterator[PrunedPrompts]:
    return (adapter for adapter in adapters if isinstance(adapter, PrunedPrompts))

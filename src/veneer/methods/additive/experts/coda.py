"""CoDA: a bottleneck for all tokens, and the frozen block for the tokens that a router selects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import HostChanged, OptionError
from veneer.injection.method import Adapter, CallState, Method, Need
from veneer.injection.sites import StreamSite


def soft_top_k(scores: Tensor, k: int, epsilon: float, steps: int = 20, first: float = 4.0, decay: float = 0.7) -> Tensor:
    """λ = argmax ⟨s, λ⟩ + ε H(λ) with Σ λ = k and 0 ≤ λ ≤ 1, H the entropy, by coordinate ascent on the dual.

    λ = exp((s + a + b) / ε), where a = ε (ln k − logsumexp((s + b) / ε)) and b = −relu(s + a) in turn, from b = −s; ε falls from
    `first` by the factor `decay` at each step. λ increases with s.

    Args:
        scores: (…, n), computed in float32 at least. `k`: 1 to n. `epsilon`: ε above 0; small values approach the k largest.
        steps: number of steps, at least 1.
    Returns:
        λ (…, n), in 0 to 1.
    Source: Lei et al., Conditional Adapters, NeurIPS 2023, which takes the steps of Blondel, Seguy and Rolet and the falling ε of
    Schmitzer.
    """
    if k >= scores.shape[-1]:
        return torch.ones_like(scores)
    s = scores if scores.dtype == torch.float64 else scores.float()
    a, b, now = torch.zeros_like(s[..., :1]), -s, max(first, epsilon)
    for _ in range(steps):
        a = now * (math.log(k) - ((s + b) / now).logsumexp(-1, keepdim=True))
        b = -(s + a).relu()
        now = max(now * decay, epsilon)
    return ((s + a + b) / now).exp()


class ConditionalAdapter(Adapter):
    """Runs the block on the selected tokens only. Tokens: (batch, tokens, width).

    Shapes: `router` (width,), `down` (h, width), `up` (width, h), `down_bias` (h,), `up_bias` (width,).
    """

    def __init__(self, site: StreamSite, options: Coda) -> None:
        super().__init__()
        self.options, self.prefix, self.name = options, site.prefix_tokens, site.name
        self.router = nn.Parameter(torch.randn(site.width) / math.sqrt(site.width))
        self.down = nn.Parameter(torch.empty(options.bottleneck, site.width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(zeros(site.width, options.bottleneck))
        self.down_bias = nn.Parameter(zeros(options.bottleneck)) if options.bias else None
        self.up_bias = nn.Parameter(zeros(site.width)) if options.bias else None
        self.state = CallState()

    def insert(self, tokens: Tensor) -> Tensor:
        """The prefix and the selected tokens, in their order: (batch, prefix + k, width)."""
        x = tokens.to(self.router.dtype)
        normed = F.layer_norm(x, x.shape[-1:])
        index, weight = self._route(normed[:, self.prefix :])
        all_index = torch.cat([_prefix_index(index, self.prefix), index + self.prefix], 1)
        selection = tokens.gather(1, all_index[..., None].expand(-1, -1, tokens.shape[-1]))
        self.state.prepared = (tokens, normed, all_index, weight, selection)
        return selection

    def remove(self, tokens: Tensor) -> Tensor:
        """All tokens: x + A(x), and λ·(block(x) − x) at those that went through the block."""
        x, normed, index, weight, selection = self.state.prepared
        self.state.prepared = None
        if tokens.shape != selection.shape:
            message = f"{self.name}: another adapter changed the number of tokens within the block; attach coda after it."
            raise HostChanged(message, where=self.name, given=tuple(tokens.shape), expected=tuple(selection.shape))
        low = F.relu(F.linear(normed, self.down, self.down_bias))
        light = x + F.linear(low, self.up, self.up_bias).to(x.dtype)
        change = (tokens - selection) * F.pad(weight, (self.prefix, 0), value=1.0).to(x.dtype)[..., None]
        return light.scatter_add(1, index[..., None].expand_as(change), change.to(light.dtype))

    def _route(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the k tokens (batch, k), ascending, and their λ."""
        scores = normed @ self.router
        k = self.options.capacity(scores.shape[1])
        index = scores.topk(k, sorted=False).indices.sort(1).values
        weight = soft_top_k(scores, k, self.options.epsilon, self.options.steps)
        return index, weight.gather(1, index)


def _prefix_index(index: Tensor, prefix: int) -> Tensor:
    return torch.arange(prefix, device=index.device).expand(len(index), -1)


@dataclass(frozen=True)
class Coda(Method):
    """y = x + A(x) + λ ∘ (block(x_S) − x_S) at the tokens S, and y = x + A(x) at the others: only k tokens run the frozen block.

    S are the k tokens of the largest scores s = LN(x)·w, with λ = SoftTopK(s, k), through which w has gradients: λ maximizes
    ⟨s, λ⟩ + ε·entropy(λ) with Σ λ = k and 0 ≤ λ ≤ 1. A(x) = Up(ReLU(Down(LN(x)))) is computed for all tokens; LN has no
    parameters. Class and register tokens always run the block, with λ = 1. Tokens of S attend to each other.

    Args:
        ratio: k is this share of the tokens without prefix, rounded, at least 1; above 0 to 1.
        bottleneck: h, width between Down and Up, at least 1.
        epsilon: ε, above 0. The authors' values are 0.02 to 1, by task; a small value leaves λ of most selected tokens near 1.
        steps: steps of SoftTopK, at least 1; below ε of 0.3, 20 are too few for a sum of k.
        bias: Down and Up have biases.
    Saves time, not parameters: a block costs about `ratio` of its time, attention less (`veneer bench --rows conditional`). A new
    adapter changes the output. Blocks must run on any part of their tokens: plain ViT, image towers of CLIP, DiT; not windows,
    rotary positions, causal masks and convolutions. Other adapters of the stream of the same block are not supported beside it;
    adapters of its layers and branches are, and see the selected tokens. In timm and open_clip the last block is not a site if
    only the class token is read after it, as its router would have no gradient.
    Counts: 2·width·h + h + 2·width per block, without biases 2·width·h + width; ViT-B/16 with h = 64 1,198,848 in all blocks.
    Source: Lei et al., Conditional Adapters, NeurIPS 2023. The authors have published no code. ε falls from 4 by 0.7 at each
    step, as in lucidrains/CoLT5-attention. Our choices: prefix tokens are always selected; the router and A read a norm without
    parameters; ReLU; w is N(0, 1 / width), Down Kaiming-uniform, Up zero. Not included: attention of the selected tokens to all
    tokens, and a phase of training in which k falls from all tokens.
    """

    name: ClassVar[str] = "coda"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = (
        "Lei et al., Conditional Adapters: Parameter-efficient Transfer Learning with Fast Inference, NeurIPS 2023"
    )
    needs: ClassVar[tuple[Need, ...]] = (Need(StreamSite, roles=("block",), where={"can_drop": True}),)
    default: ClassVar[tuple[str, ...]] = ("block",)
    fallback: ClassVar[tuple[str, ...]] = ()
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    ratio: float = 0.5
    bottleneck: int = 64
    epsilon: float = 0.3
    steps: int = 20
    bias: bool = True

    def __post_init__(self) -> None:
        checks = {
            "ratio": (0 < self.ratio <= 1, "above 0 and at most 1"),
            "bottleneck": (self.bottleneck >= 1, "at least 1"),
            "epsilon": (self.epsilon > 0, "above 0"),
            "steps": (self.steps >= 1, "at least 1"),
        }
        OptionError.check(self, checks)

    @classmethod
    def examples(cls) -> tuple[Coda, Coda]:
        """Of few tokens, most are selected, so that those of one block are in the next one, too."""
        return cls(ratio=0.8, epsilon=1.0), cls(ratio=0.8, epsilon=1.0)

    def capacity(self, tokens: int) -> int:
        """k of a number of tokens without prefix."""
        return max(1, round(self.ratio * tokens))

    def build(self, site: StreamSite) -> ConditionalAdapter:
        """The router and the bottleneck of one block."""
        return ConditionalAdapter(site, self)

    def count(self, site: StreamSite) -> int:
        """2·width·h + width, and h + width biases."""
        return 2 * site.width * self.bottleneck + site.width + (self.bottleneck + site.width if self.bias else 0)

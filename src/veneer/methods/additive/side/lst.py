"""LST: a small transformer beside the backbone that reads every block and replaces the last block's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.seams.adapter_calls import cast
from veneer.injection.sites import StreamSite

from ._chain import Chain, State

HEAD_CHANNELS = 64
"""Default number of channels per head of the backbone."""


class SideBlock(nn.Module):
    """s + Attention(LN(s)), then s + MLP(LN(s)) with GELU and four times the width. Shapes: (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, s: Tensor) -> Tensor:
        """(B, N, width) to (B, N, width)."""
        q, k, v = self.qkv(self.norm1(s)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        s = s + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        fed: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(s))))
        return s + fed


class LadderProjections(nn.Module):
    """Input and output projections of one tower's ladder: `down` (width to side), `norm`, `up` (side to width)."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Linear(width, side), nn.LayerNorm(side), nn.Linear(side, width)


class Ladder(Chain):
    """The chain of each tower and its input and output projections."""

    def __init__(self, sites: Sequence[StreamSite], reduction: int) -> None:
        super().__init__(sites)
        widths = {self.links[site.name].chain: site.width for site in sites}
        self.ends = nn.ModuleDict({str(chain): LadderProjections(width, width // reduction) for chain, width in widths.items()})


class LSTAdapter(Adapter):
    """s' = Block(g·s + (1 − g)·Down(y)), g = sigmoid(α / T); at the last block y' = Up(LN(s')). y is detached.

    Shapes: `alpha` (1,), `down` width to side, `block` of side. No parameters if the side layer is dropped: s' = s.
    """

    applies_strength: ClassVar[bool] = True
    casts: ClassVar[bool] = False
    shared: Ladder

    def __init__(self, site: StreamSite, side: int, temperature: float, dropped: bool, heads: int = 0) -> None:
        super().__init__()
        self.site, self.temperature, self.dropped = site, temperature, dropped
        if not dropped:
            self.alpha = nn.Parameter(torch.zeros(1))
            self.down = nn.Linear(site.width, side)
            self.block = SideBlock(side, heads or side // _head(side, HEAD_CHANNELS * side // site.width))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: input and output of the block."""
        link = self.shared.links[self.site.name]
        ends: Any = self.shared.ends[str(link.chain)]
        (s,) = self.shared.carry(self.site.name, x, lambda before: self._step(before, x, y, ends), self.group)
        if not link.last:
            return y
        after: Tensor = ends.up(ends.norm(s))
        return torch.lerp(y, after.to(y.dtype), self.strength.to(y.dtype))

    def _step(self, before: State, x: Tensor, y: Tensor, ends: Any) -> State:
        s = before[0] if before else ends.down(cast(x.detach(), self))
        if self.dropped:
            return (s,)
        gate = torch.sigmoid(self.alpha / self.temperature)
        return (self.block(gate * s + (1 - gate) * self.down(cast(y.detach(), self))),)


def _head(side: int, most: int) -> int:
    """Channels per side head: the largest divisor of the side width up to `most`."""
    return next(n for n in range(max(1, most), 0, -1) if side % n == 0)


@dataclass(frozen=True)
class LST(Method):
    """s_0 = Down_0(x_0), s_{i+1} = Block_i(g_i·s_i + (1 − g_i)·Down_i(y_i)); at the last block y' = Up(LN(s)).

    x_0 is the input of the first block and y_i the output of block i, both detached; Block_i is a transformer block of width/r
    channels, g_i = sigmoid(α_i / T), α_i initialized to 0. The backbone is unchanged up to its last block, whose output is
    replaced: no gradient flows through any block, and of the backbone only x_0 and the y_i are stored, for the gradients of
    Down.

    Args:
        reduction: r, at least 1; the side width is width / r, rounded down.
        temperature: T of the gates, above 0.
        skip: indices of blocks in the tower whose side layer is dropped: s passes them unchanged. The authors drop every fourth,
            `(0, 4, 8)` of 12.
        heads: heads of Block's attention, a divisor of the side width; the authors use as many as the backbone. 0: heads of 64/r
            channels, or the next smaller divisor, which is the backbone's number if its heads have 64 channels.
    The ladder spans the selected blocks and replaces the output of the last of them: the selection must include the final blocks.
    Parameters trained before it receive no gradient through it. At a strength between 0 and 1 the output is y + s·(y' − y), of
    which only y' has a gradient. Side attention is bidirectional over all tokens: a text model's masks are not applied.
    Needs sequences of one width throughout: the stages of Swin, convolutional networks and UNets would each need a ladder that
    replaces the stage's output, with gradients through all later stages.
    Counts: with side width w, per block 12·w² + 13·w of Block, (width + 1)·w of Down and 1; once (width + 1)·w of Down_0, 2·w of
    the norm and (w + 1)·width of Up. ViT-B/16 2,376,492, the 2.38 M stated by V-PETL Bench.
    Source: Sung, Cho, Bansal, LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning, NeurIPS 2022, and the
    authors' code (T5, BART, CLIP-ViL), which has no plain vision transformer. As there: equal gates at initialization, biases in
    Down and Up, Up replaces the backbone's output. Deviations: the number of heads is not read from the backbone
    (`heads`); Block is a pre-norm block as in ViT, with GELU, a four times wider MLP, and biases; layers use torch's default
    initialization, not pruned backbone weights, which would need a table of names for each model.
    Raises:
        ValueError: the side width would be 0, or is not a multiple of `heads`.
        HostChanged: in a forward pass, if blocks run out of order.
    """

    name: ClassVar[str] = "lst"
    uses: ClassVar[tuple[str, ...]] = ("low_memory", "classification")
    recommended_for: ClassVar[tuple[str, ...]] = ("low_memory",)
    paper: ClassVar[str] = "Sung, Cho, Bansal, LST: Ladder Side-Tuning, NeurIPS 2022"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(StreamSite, roles=("block",), where={"resamples": False, "layout": "NLC", "stage": None}),
    )
    default: ClassVar[tuple[str, ...]] = ("block",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-3
    shared_options: ClassVar[tuple[str, ...]] = ("reduction",)

    reduction: int = 8
    temperature: float = 0.1
    skip: tuple[int, ...] = ()
    heads: int = 0

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise OptionError.of("lst", "reduction", self.reduction, "at least 1")
        if not self.temperature > 0:
            raise OptionError.of("lst", "temperature", self.temperature, "above 0")
        if self.heads < 0:
            raise OptionError.of("lst", "heads", self.heads, "at least 0")

    @classmethod
    def examples(cls) -> tuple[LST, LST]:
        """Side networks that are wide enough in small models."""
        return cls(reduction=2), cls(reduction=4)

    def build_shared(self, sites: Sequence[StreamSite]) -> Ladder:
        """Down_0, the last norm and Up.

        Raises:
            ValueError: the side width would be 0.
        """
        for site in sites:
            self._check(site)
        return Ladder(sites, self.reduction)

    def build(self, site: StreamSite) -> LSTAdapter:
        """The side layer of one block.

        Raises:
            ValueError: the side width would be 0.
        """
        self._check(site)
        return LSTAdapter(site, site.width // self.reduction, self.temperature, site.depth in self.skip, self.heads)

    def _check(self, site: StreamSite) -> None:
        if site.width < self.reduction:
            message = f"lst: {site.name}: width {site.width} with reduction {self.reduction} gives a side width of 0; lower it"
            raise OptionError(
                message, option="reduction", method=self.name, where=site.name, given=self.reduction, expected=site.width
            )
        if self.heads and site.width // self.reduction % self.heads:
            width = site.width // self.reduction
            message = f"lst: {site.name}: side width {width} is not a multiple of heads={self.heads}"
            raise OptionError(message, option="heads", method=self.name, where=site.name, given=self.heads, expected=width)

    def count(self, site: StreamSite) -> int:
        """Block, Down and the gate; 0 if the side layer is dropped."""
        side = site.width // self.reduction
        return 0 if site.depth in self.skip else 12 * side**2 + 13 * side + (site.width + 1) * side + 1

"""DTL: a low-rank side network across all blocks that is added back to the late ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.grids import grid_of
from veneer.injection.errors import HostChanged, OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.seams.adapter_calls import cast
from veneer.injection.sites import StreamSite

from ._chain import Chain, State


class SideNetwork(Chain):
    """The chains of a tower, the blocks that they are added to, and for DTL+ the convolution of each chain.

    Shapes: `convs`, by the chain's number (width, 1, k, k).
    """

    def __init__(self, sites: Sequence[StreamSite], write_from: int | None, conv: int) -> None:
        super().__init__(sites)
        self.written = {site.name for site in sites if self._writes(site, write_from)}
        self.convs = nn.ParameterDict()
        for site in sites:
            chain = self.links[site.name].chain
            if not any(self.links[name].chain == chain for name in self.written):
                message = f"dtl: write_from={write_from} leaves no block at or after {site.name} to add to; select with where=…"
                raise OptionError(message, option="write_from", method="dtl", given=write_from, where=site.name)
            if conv and str(chain) not in self.convs:
                weight = torch.empty(site.width, 1, conv, conv)
                self.convs[str(chain)] = nn.Parameter(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))

    def _writes(self, site: StreamSite, write_from: int | None) -> bool:
        if write_from is not None and site.depth is not None:
            return site.depth >= write_from
        link = self.links[site.name]
        return link.index >= link.length // 2


class DTLAdapter(Adapter):
    """h_i = h_{i−1} + x_i Aᵀ Bᵀ; y' = y + s·swish_β(h_i) at blocks that are written to. Shapes: `A` (r, width), `B` (width, r).

    The state passed between blocks is x_j Aⱼᵀ and B_j of all blocks so far, r values per token each, from which h_i is one
    product.
    """

    applies_strength: ClassVar[bool] = True
    casts: ClassVar[bool] = False
    shared: SideNetwork

    def __init__(self, site: StreamSite, rank: int, beta: float) -> None:
        super().__init__()
        self.site, self.beta = site, beta
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, site.width), a=math.sqrt(5)))
        self.B = nn.Parameter(torch.zeros(site.width, rank))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: input and output of the block."""
        lows, ups = _halves(self.shared.carry(self.site.name, x, lambda before: self._step(before, x), self.group))
        if self.site.name not in self.shared.written:
            return y
        h = F.linear(torch.cat(lows, -1), torch.cat(ups, 1))
        written = (
            F.silu(h * self.beta) / self.beta
        )  # swish_β(h) = h ∘ sigmoid(β h), storing a single tensor for the backward pass
        if self.shared.convs:
            written = self._convolved(written)
        if self.site.layout == "NCHW":
            written = written.movedim(-1, 1)
        return y + self.strength * written

    def _step(self, before: State, x: Tensor) -> State:
        lows, ups = _halves(before)
        last = cast(x.movedim(1, -1) if self.site.layout == "NCHW" else x, self)
        return (*lows, F.linear(last, self.A), *ups, self.B)

    def _convolved(self, h: Tensor) -> Tensor:
        """The convolution over the patches; prefix tokens are not convolved."""
        weight = self.shared.convs[str(self.shared.links[self.site.name].chain)]
        if self.site.layout != "NLC":
            return _depthwise(h, weight)
        assert self.site.grid is not None
        head, patches = h[:, : self.site.prefix_tokens], h[:, self.site.prefix_tokens :]
        try:
            grid = grid_of(patches.shape[1], self.site.grid)
        except ValueError as error:
            count, where = patches.shape[1], self.site.name
            raise HostChanged(f"{where}: {error}", where=where, given=count, expected=self.site.grid) from error
        return torch.cat([head.to(h.dtype), _depthwise(patches.unflatten(1, grid), weight).flatten(1, 2).to(h.dtype)], 1)


def _halves(state: State) -> tuple[State, State]:
    return state[: len(state) // 2], state[len(state) // 2 :]


def _depthwise(h: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of (batch, height, width, channels); even kernels get one more zero on the right and bottom."""
    side = weight.shape[-1]
    before, after = (side - 1) // 2, side // 2
    padded = F.pad(h.permute(0, 3, 1, 2), (before, after, before, after))
    return F.conv2d(padded, weight, groups=len(weight)).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class DTL(Method):
    """h_i = h_{i−1} + x_i A_iᵀ B_iᵀ beside block i, h_{−1} = 0; from block M on y' = y + swish_β(h_i). B is initialized to zero.

    swish_β(u) = u·sigmoid(β u). DTL+ (`conv`): y' = y + conv(swish_β(h_i)), one depthwise convolution without bias for all blocks
    that are written to, over the patch grid; class and register tokens are not convolved.

    Gradients only reach the blocks after the first that is written to: with M = 6 of 12 blocks, blocks 7 to 11 of the backbone
    store their activations for the backward pass as with other methods, and blocks 0 to 6 store only x_i, for A_i.

    Args:
        rank: r, at least 1; the authors use 2 for ViT-B/16 and 4 for Swin-B.
        beta: β, above 0; at 100 swish is nearly ReLU.
        write_from: M, index of the first block in the tower that is written to (default: the second half of each
            chain).
        conv: kernel size of DTL+: 3, 4 or 5 by dataset in the paper; 0 for DTL.
    A chain is the selected blocks of one stage, width and layout: in Swin and convolutional networks h starts anew in each stage,
    with a separate convolution, as in the authors' code. There the default writes to every stage, so that gradients reach the
    first; the authors' Swin-B is `where="block@4:24", write_from=14`. Blocks that change width or grid are not supported.
    `by_site` may set other ranks and β; `write_from` and `conv` apply to the whole tower.
    Counts: 2·width·r per block, and width·k² for a chain's convolution. ViT-B/16: 36,864; DTL+ 43,776 with k = 3, 56,064 with 5.
    Source: Fu, Zhu, Wu, DTL: Disentangled Transfer Learning for Visual Recognition, AAAI 2024, and the authors' code. Initialized
    as there: A Kaiming-uniform, the convolution as torch's default. Deviation: the authors' model averages the patches before its
    last norm; here the host's own pooling is kept. Their code has no DTL+* of the paper's tables, which is not implemented.
    Raises:
        ValueError: a chain without a block that is written to; `conv` if tokens form no grid.
        HostChanged: in a forward pass, if blocks run out of order, or patches form no grid of the model's aspect ratio.
    """

    name: ClassVar[str] = "dtl"
    uses: ClassVar[tuple[str, ...]] = ("low_memory", "classification")
    paper: ClassVar[str] = "Fu, Zhu, Wu, DTL: Disentangled Transfer Learning for Visual Recognition, AAAI 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(StreamSite, roles=("block",), where={"resamples": False, "d_in": 0}),)
    default: ClassVar[tuple[str, ...]] = ("block",)
    learning_rate: ClassVar[float] = 1e-3
    shared_options: ClassVar[tuple[str, ...]] = ("write_from", "conv")

    rank: int = 2
    beta: float = 100.0
    write_from: int | None = None
    conv: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of("dtl", "rank", self.rank, "at least 1")
        if not self.beta > 0:
            raise OptionError.of("dtl", "beta", self.beta, "above 0")
        if self.conv < 0 or self.conv in (1, 2):
            raise OptionError.of("dtl", "conv", self.conv, "0 for none, or a kernel size of 3 or more")

    def build_shared(self, sites: Sequence[StreamSite]) -> SideNetwork:
        """The chains and their convolutions."""
        return SideNetwork(sites, self.write_from, self.conv)

    def build(self, site: StreamSite) -> DTLAdapter:
        """A and B of one block.

        Raises:
            ValueError: `conv` has no grid at this site.
        """
        if self.conv and site.layout == "NLC" and site.grid is None:
            message = "conv needs tokens that form a grid; use conv=0 or select other sites"
            raise OptionError(message, option="conv", method=self.name, given=self.conv, expected=0)
        return DTLAdapter(site, self.rank, self.beta)

    def count(self, site: StreamSite) -> int:
        """A and B."""
        return 2 * site.width * self.rank

"""Adapter+: a bottleneck after every block, with a learned scale for each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import StreamSite

from ._bottleneck import OutputBottleneck, check_bottleneck_options, count_bottleneck, truncated_normal_


class AdapterPlusAdapter(OutputBottleneck):
    """x' = x + c ∘ DropPath(Up(GELU(Down(x)))), with c = `channel_scale` (width,)."""

    def __init__(self, site: StreamSite, bottleneck: int, drop_path: float) -> None:
        super().__init__(site, bottleneck, "gelu", drop_path=drop_path)
        self.channel_scale = nn.Parameter(torch.ones(site.width))

    def last(self) -> tuple[Tensor, Tensor | None]:
        """Up, its rows scaled by c."""
        assert self.up_bias is not None
        factor = self.channel_scale * self.strength
        return self.up * factor[:, None], self.up_bias * factor


@dataclass(frozen=True)
class AdapterPlus(Method):
    """x' = x + c ∘ DropPath(Up(GELU(Down(x)))): x the stream after a block, c a learned scale per channel, initialized to ones.

    Args:
        bottleneck: h, width between Down and Up, at least 1.
        drop_path: probability of dropping the adapter for a sample in training, 0 to 1.
        std: standard deviation of the initial matrices, truncated at two of them; biases are initialized to zero.
    Counts: 2·width·h + h + 2·width per block; ViT-B/16 with h = 1, 2, 4, 8, 16, 32: 36,876, 55,320, 92,208, 165,984, 313,536,
    608,640.
    Source: Steitz, Roth, Adapters Strike Back, CVPR 2024 (post position, channel scale, Houlsby initialization), and
    the authors' code, which also uses stochastic depth of 0.1 in the host itself.
    """

    name: ClassVar[str] = "adapter_plus"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Steitz, Roth, Adapters Strike Back, CVPR 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(StreamSite),)
    default: ClassVar[tuple[str, ...]] = ("block",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    bottleneck: int = 8
    drop_path: float = 0.1
    std: float = 0.01

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck, drop_path=self.drop_path)
        if self.std <= 0:
            raise OptionError.of(self.name, "std", self.std, "above 0")

    def build(self, site: StreamSite) -> AdapterPlusAdapter:
        """Down, Up and c for one block."""
        adapter = AdapterPlusAdapter(site, self.bottleneck, self.drop_path)
        for weight in (adapter.down, adapter.up):
            truncated_normal_(weight, self.std)
        return adapter

    def count(self, site: StreamSite) -> int:
        """2·width·h + h + 2·width."""
        return count_bottleneck(site.width, self.bottleneck) + site.width

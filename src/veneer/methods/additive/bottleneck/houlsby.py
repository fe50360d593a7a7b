"""Houlsby's adapters: a bottleneck after the attention and one after the MLP of every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import BranchSite

from ._bottleneck import OutputBottleneck, check_bottleneck_options, count_bottleneck, truncated_normal_


@dataclass(frozen=True)
class Houlsby(Method):
    """y' = y + Up(GELU(Down(y))): y the output of the attention or the MLP, before it is added to the stream.

    Args:
        bottleneck: h, width between Down and Up, at least 1.
        std: standard deviation of the initial matrices, truncated at two of them; biases are initialized to zero.
    Counts: 2·width·h + h + width per branch, two branches per block; ViT-B/16 2,379,264 with h = 64 and 313,536 with h = 8.
    Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019, section 2.1 and figure 2; std 0.01 from its
    section 3.6, where the authors' code has 0.001 and h = 64. In vision transformers the branch ends after layer scale and
    stochastic depth, as in Steitz, Roth, CVPR 2024, and Zhang et al., NOAH, 2022. Deviations: exact GELU instead of the code's
    tanh approximation; the paper also trains the norms, which is `train="norm"` here.
    """

    name: ClassVar[str] = "houlsby"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    bottleneck: int = 64
    std: float = 0.01

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck)
        if self.std <= 0:
            raise OptionError.of(self.name, "std", self.std, "above 0")

    def build(self, site: BranchSite) -> OutputBottleneck:
        """Down and Up for one branch."""
        adapter = OutputBottleneck(site, self.bottleneck, "gelu")
        for weight in (adapter.down, adapter.up):
            truncated_normal_(weight, self.std)
        return adapter

    def count(self, site: BranchSite) -> int:
        """2·width·h + h + width."""
        return count_bottleneck(site.width, self.bottleneck)

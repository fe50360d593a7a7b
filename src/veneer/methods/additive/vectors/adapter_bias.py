"""AdapterBias: one trained direction per MLP, added to each token with a weight computed from the token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.convolve import convolve
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite


class TokenWeight(nn.Module):
    """w and c of z = w·u + c. Shapes: `weight` (1, d_in / groups[, k, k]), `bias` (1,); initialized as torch's linear layer."""

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, *site.weight_shape[1:]))
        self.bias = nn.Parameter(torch.empty(1))
        bound = 1 / math.sqrt(math.prod(site.weight_shape[1:]))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


class TokenWeights(nn.ModuleDict):
    """w and c for all layers of one tower; one pair for each shape of a row of their weights."""

    def __init__(self, sites: Sequence[WeightSite]) -> None:
        super().__init__({key_of(site): TokenWeight(site) for site in sites})


def key_of(site: WeightSite) -> str:
    """Shape of a row of the weight, as a name of a module."""
    return "x".join(map(str, site.weight_shape[1:]))


class AdapterBiasAdapter(Adapter):
    """y' = y + (w·u + c) v, which is W' = W + v wᵀ and b' = b + c v. `vector`: v (d_out,)."""

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True
    shared: TokenWeights

    def __init__(self, site: WeightSite, share: bool) -> None:
        super().__init__()
        self.site = site
        self.token = None if share else TokenWeight(site)
        self.vector = nn.Parameter(zeros(site.d_out))

    @property
    def token_weight(self) -> TokenWeight:
        """w and c, either shared or for this layer only."""
        if self.token is not None:
            return self.token
        shared = self.shared[key_of(self.site)]
        assert isinstance(shared, TokenWeight)
        return shared

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: u, the layer's input; y: its output."""
        site, token = self.site, self.token_weight
        z = convolve(x, token.weight, site.stride, site.padding, site.dilation) + token.bias
        return y + z * self._direction(len(site.kernel))

    def weight(self, weight: Tensor) -> Tensor:
        """W + v wᵀ."""
        return weight + self._direction(weight.ndim - 1) * self.token_weight.weight

    def bias(self, bias: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """b + c v."""
        return bias + self._direction() * self.token_weight.bias

    def _direction(self, ones: int = 0) -> Tensor:
        """v times the strength, followed by dimensions of size 1."""
        return (self.vector * self.strength).view(-1, *(1,) * ones)


@dataclass(frozen=True)
class AdapterBias(Method):
    """y' = W u + b + (w·u + c) v: u the inner activations of the MLP; v (d_out,) is initialized to zero.

    Each token is shifted along one trained direction v, by a weight that a linear layer with one output computes from the token.
    It equals a LoRA of rank 1 on the MLP's output layer with a trained bias c v, and merges as such. In blocks that compute
    attention and MLP side by side and have one output layer for both, u is the input of that layer.

    Args:
        share: all layers of a tower whose weights have rows of one shape share w and c.
    Convolutions: w is a kernel, and w·u a convolution with one output. Grouped convolutions are not supported, because w would
    have to see all groups, which no weight of the layer does.
    Layers of queries and keys are not supported: a softmax cancels c v in the keys.
    Layers without a bias are adapted at their output, but cannot be merged, because there is no tensor for c v.
    Counts: d_in·k·k + 1 + d_out per site, with `share` d_out, and d_in·k·k + 1 once; ViT-B/16 46,092, shared 12,289.
    Source: Fu, Chen, Lee, AdapterBias, Findings of NAACL 2022, section 3.2, and the authors' code: v zero, w and c as torch's
    linear layer, learning rate 1e-4. The paper also trains the norm after the MLP, which is `train="norm"` here. Deviations: a
    vision transformer has its norm before the branch, so v is added at the end of the MLP, before layer scale; the shift is added
    before the dropout that follows the layer in the host, where the code adds it after.
    """

    name: ClassVar[str] = "adapter_bias"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = (
        "Fu, Chen, Lee, AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP Tasks, "
        "Findings of NAACL 2022"
    )
    needs: ClassVar[tuple[Need, ...]] = (
        Need(
            WeightSite,
            roles=("mlp.*", "single.out", "attn.out", "xattn.out", "conv", "conv.*"),
            where={"kind": ("linear", "conv"), "groups": 1, "fused": False, "called": True},
        ),
    )
    default: ClassVar[tuple[str, ...]] = ("mlp.out", "mlp.context.out", "single.out")
    learning_rate: ClassVar[float] = 1e-4
    shared_options: ClassVar[tuple[str, ...]] = ("share",)

    share: bool = False

    def build_shared(self, sites: Sequence[WeightSite]) -> TokenWeights | None:
        """w and c, if shared."""
        return TokenWeights(sites) if self.share else None

    def build(self, site: WeightSite) -> AdapterBiasAdapter:
        """v = 0 for one layer, with w and c unless shared."""
        return AdapterBiasAdapter(site, self.share)

    def count(self, site: WeightSite) -> int:
        """d_out, with d_in·k·k + 1 unless shared."""
        return site.d_out + (0 if self.share else math.prod(site.weight_shape[1:]) + 1)

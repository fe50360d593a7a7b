"""MAD-X: a bottleneck after every MLP and an invertible adapter of the embeddings for each domain, under adapters of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite, StreamSite
from veneer.methods.additive.bottleneck._bottleneck import OutputBottleneck, count_bottleneck


class Coupling(nn.Module):
    """NICE: y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁); x₁ the first width // 2 channels. F and G: a linear layer, ReLU, a linear layer.

    Shapes: `f_down` (h₂, d₂), `f_up` (d₁, h₂), `g_down` (h₁, d₁), `g_up` (d₂, h₁) with hᵢ = dᵢ // reduction, at least 1; biases.
    """

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.first, second = width // 2, width - width // 2
        for name, d_in, d_out in (("f", second, self.first), ("g", self.first, second)):
            hidden = max(1, d_in // reduction)
            for part, rows, columns in (("down", hidden, d_in), ("up", d_out, hidden)):
                weight = torch.empty(rows, columns)
                self.register_parameter(f"{name}_{part}", nn.Parameter(nn.init.normal_(weight, std=0.02)))
                self.register_parameter(f"{name}_{part}_bias", nn.Parameter(torch.zeros(rows)))

    def _change(self, name: str, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (self.get_parameter(f"{name}_{p}") for p in ("down", "down_bias", "up", "up_bias"))
        return F.linear(F.relu(F.linear(x, down, down_bias)), up, up_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features with channels last to features of the same shape."""
        first, second = x[..., : self.first], x[..., self.first :]
        first = first + self._change("f", second)
        return torch.cat([first, second + self._change("g", first)], -1)


class EmbeddingCoupling(Adapter):
    """x' = coupling(x): x the input of the first block."""

    input_port: ClassVar[Literal["enter"]] = "enter"

    def __init__(self, site: StreamSite, reduction: int) -> None:
        super().__init__()
        self.coupling = Coupling(site.width, reduction)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the input of the first block."""
        changed: Tensor = self.coupling(x)
        return changed


@dataclass(frozen=True)
class MadX(Method):
    """x' = (x₁ + F(x₂), x₂ + G(x₁')) of the embeddings, and y' = y + Up(ReLU(Down(y))) for every MLP y: the adapter of a domain.

    MAD-X stacks a task adapter on a domain adapter: the domain adapter, such as of sketches, infrared or medical images, is
    trained first, on images of the domain and with any objective of its base model; it is then frozen, a task adapter such as
    `pfeiffer` is trained on top, and for images of another domain the domain adapter is exchanged.

        veneer transfer DOMAIN_IMAGES --method mad_x --out runs/photos
        veneer transfer TASK_IMAGES --method pfeiffer --with runs/photos --out runs/task
        veneer predict runs/task IMAGES --exchange mad_x=runs/sketches

    For diffusion models the objective is the denoising loss, `veneer personalize --method mad_x`, the task is trained with
    `--with`, and `veneer generate --adapter` names the domain adapter and then the task adapter. In Python, `attach` both, train
    the second, and exchange the first in place: `domain.swap("sketches.safetensors")`.

    BAD-X has one adapter for a pair of domains: train `mad_x` on images of both, in equal parts, and keep it for both.

    Args:
        reduction: width of the bottlenecks, as a part of that of the model: h = width // reduction, at least 1.
        coupling_reduction: width between the layers of F and G, as a part of their input: d // coupling_reduction, at least 1.
    Without `block` in `where`, the embeddings are not adapted. Features with channels first, and first blocks that change the
    width, have no coupling.
    Counts: 2·width·h + h + width per block, h = width // reduction, and for the coupling with halves d₁, d₂ of the width and
    hᵢ = dᵢ // coupling_reduction (h₁ + h₂)·(width + 1) + width; ViT-B/16 7,387,776 with h = 384, of which the coupling 296,064.
    Source: Pfeiffer et al., MAD-X, EMNLP 2020, sections 4.1 to 4.3, and AdapterHub's `SeqBnInvConfig` and `NICECouplingBlock`:
    ReLU, reduction 2 in both, normal initialization with 0.02, biases zero. BAD-X: Parović et al., NAACL 2022. Deviations:
    domains in place of languages; no inverse of the coupling before the output layer: a masked language model has the same
    embeddings at its input and output, vision models and denoisers do not; the position of the bottleneck as in `pfeiffer`.
    """

    name: ClassVar[str] = "mad_x"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Pfeiffer et al., MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer, EMNLP 2020"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(BranchSite),
        Need(StreamSite, roles=("block",), where={"depth": 0, "d_in": 0, "layout": ("NLC", "NHWC")}),
    )
    default: ClassVar[tuple[str, ...]] = ("mlp", "block")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-4

    reduction: int = 2
    coupling_reduction: int = 2

    def __post_init__(self) -> None:
        for option in ("reduction", "coupling_reduction"):
            if getattr(self, option) < 1:
                raise OptionError.of(self.name, option, getattr(self, option), "at least 1")

    def build(self, site: BranchSite | StreamSite) -> Adapter:
        """Down and Up for one branch, or the coupling of the embeddings."""
        if isinstance(site, StreamSite):
            return EmbeddingCoupling(site, self.coupling_reduction)
        adapter = OutputBottleneck(site, self._width(site), "relu")
        for weight in (adapter.down, adapter.up):
            nn.init.normal_(weight, std=0.02)
        return adapter

    def _width(self, site: BranchSite) -> int:
        return max(1, site.width // self.reduction)

    def count(self, site: BranchSite | StreamSite) -> int:
        """2·width·h + h + width, or (h₁ + h₂)·(width + 1) + width."""
        if isinstance(site, StreamSite):
            halves = site.width // 2, site.width - site.width // 2
            return sum(max(1, half // self.coupling_reduction) for half in halves) * (site.width + 1) + site.width
        return count_bottleneck(site.width, self._width(site))

"""GLoRA: scales and shifts a weight and its bias by terms of configurable structure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite, Site, WeightSite

Form = Literal["low_rank", "vector", "scalar", "none"]
BiasForm = Literal["vector", "scalar", "none"]
Product = Literal["elements", "matrices"]


class Term(nn.Module):
    """A zero-initialized term: `up` (d_out, rank) times `down` (rank, width), one value per output, a scalar, or none."""

    def __init__(self, form: Form, d_out: int, width: int, rank: int) -> None:
        super().__init__()
        if form != "none":
            columns = {"low_rank": (d_out, rank), "vector": (d_out, 1), "scalar": (1, 1)}[form]
            self.up = nn.Parameter(torch.zeros(columns))
        self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, width))) if form == "low_rank" else None
        self.form = form

    def forward(self) -> Tensor:
        """(d_out, width), or a tensor broadcastable to it."""
        return self.up if self.down is None else self.up @ self.down


class GLoRAAdapter(Adapter):
    """W' = W + W ∘ A + B of a weight, flattened to (d_out, width); b' = b + b ∘ D + E of a bias, (d_out, 1).

    With `matrices` it is W' = W + W A + B, where A (d_in / groups, d_in / groups) mixes the inputs of W, kernel by kernel.

    There is no output form: (W ∘ A) x needs W.
    """

    applies_strength: ClassVar[bool] = True

    def __init__(self, scale: Term, shift: Term, matrices: bool = False) -> None:
        super().__init__()
        self.scale, self.shift, self.matrices = scale, shift, matrices

    def weight(self, weight: Tensor) -> Tensor:
        """The scaled and shifted tensor."""
        after = weight.reshape(len(weight), -1)
        if self.scale.form != "none":
            after = after + self._scaled(weight) * self.strength
        if self.shift.form != "none":
            after = after + self.shift() * self.strength
        return after.reshape(weight.shape)

    def _scaled(self, weight: Tensor) -> Tensor:
        """W ∘ A, or W A, flattened."""
        if not self.matrices:
            return weight.reshape(len(weight), -1) * self.scale()
        up, down = self.scale.up, self.scale.down
        assert down is not None
        inputs = weight.reshape(*weight.shape[:2], -1).mT  # (d_out, kernel, d_in)
        return (inputs @ up @ down).mT.flatten(1)


@dataclass(frozen=True)
class GLoRA(Method):
    """W' = W + W ∘ A + B and b' = b + b ∘ D + E: scales and shifts weight and bias of a layer; all terms initialized to zero.

    Args:
        A, B: `low_rank` (d_out, rank) times (rank, width), `vector` one value per output, `scalar`, or `none`.
        D, E: `vector`, `scalar` or `none`; for the biases among the sites, roles `bias.*`.
        rank: rank of `low_rank` terms, at least 1.
        product: product of W with a low-rank A: `elements` W ∘ A, or `matrices` W A, as in LyCORIS, where A mixes the inputs of a
            weight.
    Convolutions: the kernel is flattened, width = d_in·k·k / groups, which includes grouped and depthwise ones.
    Has only the weight form, so a quantized base is rejected.
    Counts: per term rank·(d_out + width), d_out, 1 or 0; for the A of W A 2·rank·d_in / groups. ViT-B/16, rank 4, all low-rank
    and vectors: 1,492,992.
    Source: Chavan et al., One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, 2023. A multiplies
    elementwise, as in the authors' code and in peft; the paper writes a matrix product, as LyCORIS computes. Deviations:
    no C (W C is a vector added to the bias, which E covers), no new biases, and one form for all layers where the
    paper searches one for each.
    """

    name: ClassVar[str] = "glora"
    uses: ClassVar[tuple[str, ...]] = ("few_photos",)
    paper: ClassVar[str] = "Chavan et al., One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, 2023"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(WeightSite, where={"kind": ("linear", "conv")}),
        Need(ParamSite, roles=("bias.*",)),
    )
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp", "bias.attn", "bias.xattn", "bias.mlp")
    learning_rate: ClassVar[float] = 5e-4

    A: Form = "low_rank"
    B: Form = "low_rank"
    D: BiasForm = "vector"
    E: BiasForm = "vector"
    rank: int = 4
    product: Product = "elements"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of("glora", "rank", self.rank, "at least 1")
        for term, allowed in (("A", Form), ("B", Form), ("D", BiasForm), ("E", BiasForm), ("product", Product)):
            if getattr(self, term) not in get_args(allowed):
                raise OptionError.of("glora", term, getattr(self, term), f"one of {', '.join(get_args(allowed))}")

    def build(self, site: WeightSite | ParamSite) -> GLoRAAdapter:
        """A and B for a weight, D and E for a bias."""
        size, (first, second) = self._size(site), self._forms(site)
        inputs = self._inputs(site)
        scale = Term(first, *(size if inputs is None else (inputs, inputs)), self.rank)
        return GLoRAAdapter(scale, Term(second, *size, self.rank), inputs is not None)

    def count(self, site: WeightSite | ParamSite) -> int:
        """Parameters of both terms."""
        d_out, width = self._size(site)
        sizes = {"low_rank": self.rank * (d_out + width), "vector": d_out, "scalar": 1, "none": 0}
        (first, second), inputs = self._forms(site), self._inputs(site)
        return sizes[second] + (sizes[first] if inputs is None else 2 * self.rank * inputs)

    def _inputs(self, site: WeightSite | ParamSite) -> int | None:
        """Size of an A that is multiplied with W as a matrix; None for other forms."""
        if isinstance(site, WeightSite) and self.product == "matrices" and self.A == "low_rank":
            return site.weight_shape[1]
        return None

    def _forms(self, site: Site) -> tuple[Form, Form]:
        return (self.A, self.B) if isinstance(site, WeightSite) else (self.D, self.E)

    @staticmethod
    def _size(site: WeightSite | ParamSite) -> tuple[int, int]:
        shape = site.weight_shape if isinstance(site, WeightSite) else site.shape
        return shape[0], math.prod(shape[1:])

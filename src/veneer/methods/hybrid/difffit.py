"""DiffFit: new scales after linear layers, with deltas of bias, norm and class-embedding tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.channel_scale import scale_features
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite, ParamSite, WeightSite
from veneer.methods.reparameterized.scale.ssf import ScaleAdapter, ScaleShiftAdapter
from veneer.methods.selective.tensors._replacement import shape_of
from veneer.methods.selective.tensors.bitfit import BitFitAdapter
from veneer.methods.selective.tensors.norm_tuning import DeltaAdapter

DUPLICATE = re.compile(r"^transformer_blocks\.\d+\.(norm1\.emb\..+)$")
"""Names of the embedders of timesteps and classes that each block of diffusers' DiT has a copy of."""


class GainAdapter(ScaleAdapter):
    """y' = γ ∘ y with γ = 1 + `gain` (d_out,), which is W' = diag(γ) W; for layers without a bias."""

    def __init__(self, site: WeightSite) -> None:
        super().__init__(site)
        nn.init.zeros_(self.gain)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: the layer's output."""
        is_conv = isinstance(self.site, WeightSite) and self.site.kind == "conv"
        return scale_features(y, 1 + self.gain * self.strength, None, is_conv)


class GainShiftAdapter(ScaleShiftAdapter):
    """y' = γ ∘ y + `shift`, which is W' = diag(γ) W and b' = γ ∘ b + shift; for layers with a bias."""

    def __init__(self, site: WeightSite) -> None:
        super().__init__(site)
        nn.init.zeros_(self.gain)
        nn.init.zeros_(self.shift)


class BranchGain(Adapter):
    """y' = γ ∘ y with γ = 1 + `gain` (width,): y the output of a residual branch."""

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[Literal["write"]] = "write"

    def __init__(self, site: BranchSite) -> None:
        super().__init__()
        self.layout = site.layout
        self.gain = nn.Parameter(torch.zeros(site.width))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: the branch."""
        gain = 1 + self.gain * self.strength
        return y * (gain.view(-1, 1, 1) if self.layout == "NCHW" else gain)


class TableAdapter(DeltaAdapter):
    """E' = E + `delta` for an embedding table E."""

    def output(self, ids: Tensor, rows: Tensor) -> Tensor:
        """The rows of E' with the given ids."""
        return rows + F.embedding(ids, self.delta) * self.strength


class SharedDeltas(nn.Module):
    """Deltas of tensors that every block has a copy of, by the name in the block."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.deltas = nn.ParameterDict({_key(name): torch.zeros(shape) for name, shape in shapes.items()})


class DuplicateAdapter(Adapter):
    """t' = t + the delta that all copies of t share."""

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True
    shared: SharedDeltas

    def __init__(self, name: str) -> None:
        super().__init__()
        self.key = _key(name)

    def weight(self, weight: Tensor) -> Tensor:
        """t + delta."""
        return weight + self.shared.deltas[self.key] * self.strength


class DuplicateTable(DuplicateAdapter):
    """The same for an embedding table."""

    def output(self, ids: Tensor, rows: Tensor) -> Tensor:
        """The rows of the changed table with the given ids."""
        return rows + F.embedding(ids, self.shared.deltas[self.key]) * self.strength


def _key(name: str) -> str:
    return name.replace(".", "_")


def name_in_block(site: Any) -> str:
    """The name without the block, of a tensor that every block has a copy of; else an empty string."""
    match = DUPLICATE.match(site.name)
    return match[1] if match else ""


@dataclass(frozen=True)
class DiffFit(Method):
    """y = γ ∘ (W x + b) + db: scales γ after linear layers, and deltas of all biases, norm scales and class embeddings.

    γ is a vector, one for each output channel, initialized to one; deltas are initialized to zero. By default γ is after queries,
    keys and values and after the first layer of the MLP, in self-attention and cross-attention. With γ at the attention output
    and at each residual branch instead of the MLP's first layer, as in the port of mkshing to Stable Diffusion:
    `where="bias norm attn xattn mlp not:mlp.in not:mlp.out"`, 581,124 parameters in SD 1.5; scales of branches cannot be merged.
    A scaled layer and its bias have one adapter, with γ and db.

    diffusers' DiT has a copy of the embedders of timesteps and classes in every block, 28 in DiT-XL/2, of which the original
    model has one. All copies share their deltas here, so that the model and the counts are those of the original DiT.
    Counts: biases, norm scales, class embeddings, and d_out for γ of each scaled layer. DiT-XL/2: biases 489,632, scales 7·width
    per block 225,792, class embeddings (classes + 1)·width; with 101 classes 832,928, the 0.83 M of the paper; with ImageNet's
    1,000 1,868,576. Without shared copies the biases are 551,840. Its norms have no scales. ViT-B/16 without a head 186,624.
    Source: Xie et al., DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning,
    ICCV 2023, section 3.2; mkshing's port for what is trained. The authors' code for DiT is not public: that γ are after q, k, v
    and the MLP's first layer is a reading of their count, 7·width per block. Deviations: deltas on a frozen base; db is added
    after γ, in the port before, which is the same function class; class embeddings that a linear layer computes are not trained.
    """

    name: ClassVar[str] = "difffit"
    uses: ClassVar[tuple[str, ...]] = ("style", "classification", "smallest_file")
    paper: ClassVar[str] = "Xie et al., DiffFit: Unlocking Transferability of Large Diffusion Models, ICCV 2023"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(ParamSite, roles=("bias", "bias.*", "norm", "norm.*")),
        Need(WeightSite, roles=("class.embed",), where={"kind": "embedding"}),
        Need(WeightSite, roles=("attn.*", "xattn.*", "mlp.*"), where={"kind": ("linear", "conv")}),
        Need(BranchSite),
    )
    default: ClassVar[tuple[str, ...]] = (
        "attn.{q,k,v}", "xattn.{q,k,v}", "mlp.in", "bias", "not:bias.head", "norm", "class.embed",
    )  # fmt: skip
    learning_rate: ClassVar[float] = 1e-3

    def distinct_sites(self, sites: Sequence[Any]) -> list[Any]:
        """The sites without biases of scaled layers, whose adapters train them."""
        scaled = {(s.component, s.bias, s.bias_rows) for s in sites if is_scaled(s) and s.bias}
        biases = [(s, (s.component, f"{s.path}.{s.param}")) for s in sites if isinstance(s, ParamSite)]
        trained = {s.name for s, key in biases if (*key, None) in scaled or (*key, s.rows) in scaled}
        return [site for site in sites if site.name not in trained]

    def build_shared(self, sites: Sequence[Any]) -> SharedDeltas | None:
        """The deltas of tensors that every block has a copy of, or None if there are none."""
        shapes = {name: shape_of(site) for site in sites if (name := name_in_block(site))}
        return SharedDeltas(shapes) if shapes else None

    def build(self, site: ParamSite | WeightSite | BranchSite) -> Adapter:
        """A delta of the tensor's shape, or a scale for each channel."""
        if isinstance(site, BranchSite):
            return BranchGain(site)
        if isinstance(site, WeightSite) and is_scaled(site):
            return GainShiftAdapter(site) if site.bias else GainAdapter(site)
        is_table = isinstance(site, WeightSite)
        if name := name_in_block(site):
            return DuplicateTable(name) if is_table else DuplicateAdapter(name)
        if isinstance(site, WeightSite):
            return TableAdapter(site.weight_shape)
        is_bias = site.role == "bias" or site.role.startswith("bias.")
        return BitFitAdapter(site.shape, site.channel_dim) if is_bias else DeltaAdapter(site.shape)

    def count(self, site: ParamSite | WeightSite | BranchSite) -> int:
        """Number of elements of the tensor, 0 for a shared delta, or the number of channels, twice for a layer with a bias."""
        if isinstance(site, BranchSite):
            return site.width
        if isinstance(site, WeightSite) and is_scaled(site):
            return site.d_out * (2 if site.bias else 1)
        return 0 if name_in_block(site) else math.prod(shape_of(site))


def is_scaled(site: Any) -> bool:
    """True for a layer with γ."""
    return isinstance(site, WeightSite) and site.kind != "embedding"

"""AdapterFusion: attention over the outputs of frozen adapters of other tasks, at every site and token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.functional.channels import channels_product
from veneer.injection.errors import OptionError, StateError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite, Site, StreamSite
from veneer.methods.additive.bottleneck._bottleneck import Bottleneck

from ._fused import FusedAdapters, as_option, build_frozen, inner_method, read_fused

DECAY = 0.99
"""Decay of the moving average of the attention to each adapter, by forward pass."""


class FusionAdapter(Adapter):
    """y' = y + V Σ_n w_n a_n with w = softmax_n((Q x + b)·(K a_n)). Shapes: `query`, `key`, `value` (width, width), `query_bias`
    (width,); buffers of the frozen adapters under `adapters`. Training state for pruning: `attention` (n,), means of w."""

    input_port: ClassVar[Literal["read", "normed", "write"]] = "read"
    training_buffers: ClassVar[tuple[str, ...]] = ("attention",)
    attention: Tensor

    def __init__(self, site: BranchSite | StreamSite, adapters: Sequence[Bottleneck], value: bool, records: bool = False) -> None:
        super().__init__()
        self.site, self.fused, self.records = site, None, records
        self.register_buffer("attention", torch.zeros(len(adapters)), persistent=False)
        self.adapters = nn.ModuleList(adapters).eval()
        width = site.width
        self.query, self.key = (nn.Parameter(torch.empty(width, width)) for _ in range(2))
        self.query_bias = nn.Parameter(torch.zeros(width))
        for matrix in (self.query, self.key):
            nn.init.normal_(matrix, std=0.02)
        self.value = nn.Parameter(torch.full((width, width), 1e-6).fill_diagonal_(1.0)) if value else None

    fused: FusedAdapters | None

    def train(self, mode: bool = True) -> FusionAdapter:
        """Sets the mode; the frozen adapters stay in evaluation mode, without dropout."""
        super().train(mode)
        self.adapters.eval()
        return self

    def enter(self, tower: nn.Module) -> None:
        """Compares the base model with that of the files."""
        if self.fused is not None:
            self.fused.check_base(AdapterFusion.name, self.site.component, tower)
            self.fused = None

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: what the adapters read, also the query; y: the tensor that they change; both in the site's layout."""
        layout, dim = self.site.layout, 2 if self.site.layout == "NCHW" else -1
        changes = torch.stack([adapter.output(x, y) - y for adapter in self.adapters])  # type: ignore[operator]
        keys = channels_product(changes.flatten(0, 1), self.key, None, layout).unflatten(0, (len(self.adapters), -1))
        scores = (channels_product(x, self.query, self.query_bias, layout) * keys).sum(dim, keepdim=True)
        weights = scores.softmax(0)
        if self.records and self.training:
            mean = weights.detach().flatten(1).mean(1)
            self.attention.lerp_(mean.to(self.attention), 1 - DECAY)  # in place, because checkpoints hold this tensor
        mixture = (weights * changes).sum(0)
        return y + (mixture if self.value is None else channels_product(mixture, self.value, None, layout))

    def prune(self, keep: int) -> list[int]:
        """Removes all adapters but those with most attention. Returns their indices, ascending."""
        kept = sorted(self.attention.topk(keep).indices.tolist())
        self.adapters = nn.ModuleList(self.adapters[i] for i in kept)
        self.attention, self.records = self.attention[kept], False
        return kept


class OutputFusionAdapter(FusionAdapter):
    """Fusion of adapters that read the tensor that they change."""

    input_port: ClassVar[Literal["write"]] = "write"


class NormedFusionAdapter(FusionAdapter):
    """Fusion of adapters that read the output of the branch's norm."""

    input_port: ClassVar[Literal["normed"]] = "normed"


KINDS: dict[str, type[FusionAdapter]] = {
    kind.input_port: kind for kind in (FusionAdapter, OutputFusionAdapter, NormedFusionAdapter)
}
"""The fusion of adapters, by the port that they read."""


@dataclass(frozen=True)
class AdapterFusion(Method):
    """y' = y + V Σ_n w_n a_n, w = softmax_n((Q x + b)·(K a_n)): a_n the change of the n-th frozen adapter, x its input.

    The second stage of two: adapters of one bottleneck method (`pfeiffer`, `houlsby`, `adaptformer`, `adapter_plus`,
    `convpass`, `mona`) were trained on other data, with the same options, sites and base model; their files stay frozen, and Q,
    K, V and b are trained at each site. The new file has the adapters as well and needs no other.

    Args:
        adapters: files of the adapters, at least two; in saved files their names.
        value: train V; without it the adapters' changes are only weighted.
        keep: adapters that each site keeps after training, those with the highest mean attention; 0 for all. The others are
            removed from the file.
        regularization: λ of the penalty λ·‖I − V‖² over all sites (Frobenius), at least 0.
        fused: method and options of the adapters in a saved file; set from `adapters`.
        kept: by site the names of its adapters in a saved file, after `keep` has removed others.
    Without `where`, the sites are those of the adapters.
    Counts: 3·width² + width per site, without V 2·width² + width; ViT-B/16 21,242,880, and 14,164,992 without V.
    Source: Pfeiffer et al., AdapterFusion, EACL 2021, equation 4, and AdapterHub's `BertFusion`: Q and K from a normal
    distribution with 0.02, b zero, V the identity with 1e-6 beside the diagonal, λ 0.01. `keep`: Rücklé et al., AdapterDrop,
    EMNLP 2021, section 5, where the mean is over the training set, here a moving average over training passes. Deviations: K has
    no bias, which the softmax cancels (AdapterHub counts it, 9,216 on ViT-B/16); the frozen adapters have no dropout in training;
    the temperature that AdapterHub offers, 50 falling to 1, is missing.
    """

    name: ClassVar[str] = "adapter_fusion"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Pfeiffer et al., AdapterFusion: Non-Destructive Task Composition for Transfer Learning, EACL 2021"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite), Need(StreamSite))
    default: ClassVar[tuple[str, ...]] = ("mlp",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-4
    shared_options: ClassVar[tuple[str, ...]] = ("adapters", "fused", "regularization", "keep", "kept")

    adapters: tuple[str, ...] = ()
    value: bool = True
    keep: int = 0
    regularization: float = 0.01
    fused: Mapping[str, Any] = field(default_factory=dict, hash=False)
    kept: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.regularization < 0:
            raise OptionError.of(self.name, "regularization", self.regularization, "at least 0")
        if self.keep < 0 or (self.adapters and self.keep > len(self.adapters)):
            raise OptionError.of(self.name, "keep", self.keep, f"from 0 to the number of adapters, {len(self.adapters)}")
        if len(self.adapters) == 1:
            raise OptionError.of(self.name, "adapters", self.adapters, "at least two files")
        if self.adapters and not self.fused:
            fused = read_fused(self.name, self.adapters)
            object.__setattr__(self, "fused", as_option(fused.method))
            self._set_files(fused)

    def _set_files(self, fused: FusedAdapters) -> None:
        object.__setattr__(self, "_files", fused)
        object.__setattr__(self, "default", tuple(f"name:{site}" for site in fused.stored[0].sites))

    @property
    def files(self) -> FusedAdapters | None:
        """The adapters that were read, or None if only their names are known."""
        found: FusedAdapters | None = self.__dict__.get("_files")
        return found

    def at(self, site: Site) -> Method:
        """The config of one site, with the files of this one."""
        config = super().at(site)
        if self.files is not None and isinstance(config, AdapterFusion):
            config._set_files(self.files)
        return config

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """Two and three adapters that were not trained."""
        options = {"pfeiffer": {"reduction": 2}, "houlsby": {"bottleneck": 4, "std": 0.1}}
        fused = [{"method": name, "options": own} for name, own in options.items()]
        return cls(("first", "second"), fused=fused[0]), cls(("first", "second", "third"), fused=fused[1])

    def config(self) -> dict[str, Any]:
        """The options as JSON values, with names of the adapters instead of paths."""
        options = super().config()
        return options if self.files is None else {**options, "adapters": self.files.names}

    def build(self, site: BranchSite | StreamSite) -> FusionAdapter:
        """The frozen adapters of one site, Q, K and V.

        Raises:
            OptionError: there are no adapters, or they have other sites or widths.
        """
        if not self.adapters:
            raise OptionError.of(self.name, "adapters", (), "at least two files of trained adapters")
        stored, count = () if self.files is None else self.files.stored, len(self.adapters)
        if site.name in self.kept:
            count = len(self.kept[site.name])
            stored = tuple(each for each, name in zip(stored, self.adapters, strict=False) if name in self.kept[site.name])
        frozen = build_frozen(self.name, inner_method(self.name, self.fused), site, count, stored, KINDS)
        adapter = KINDS[frozen[0].input_port](site, frozen, self.value, 0 < self.keep < count)
        adapter.fused = self.files
        return adapter

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> AdapterFusion:
        """Removes the adapters with least attention at every site. Returns the config with the names of those that are kept.

        Raises:
            StateError: no forward pass in training mode has recorded the attention.
        """
        parts = list(adapters)
        if not 0 < self.keep < len(self.adapters) or self.kept:
            return self
        for site, adapter in parts:
            if not adapter.attention.any():
                message = f"{self.name}: {site.name} has no recorded attention. Run forward passes in training mode first."
                raise StateError(message, where=site.name, given="untrained", expected="trained")
        names = self.adapters if self.files is None else self.files.names
        kept = {site.name: [names[i] for i in adapter.prune(self.keep)] for site, adapter in parts}
        config = dataclasses.replace(self, adapters=tuple(names), kept=kept)
        if self.files is not None:
            config._set_files(self.files)
        return config

    def penalty(self, adapters: Iterable[tuple[Site, Any]]) -> Tensor | None:
        """λ·Σ ‖I − V‖² over all sites."""
        values = [adapter.value for _, adapter in adapters if adapter.value is not None]
        if not values or not self.regularization:
            return None
        return self.regularization * torch.stack([(torch.eye(len(v), device=v.device) - v).square().sum() for v in values]).sum()

    def count(self, site: BranchSite | StreamSite) -> int:
        """3·width² + width, without V 2·width² + width."""
        return (3 if self.value else 2) * site.width**2 + site.width

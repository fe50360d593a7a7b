"""LoRA: a low-rank update of a frozen weight, initialized randomly or from the weight, and its Tucker form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, get_args

from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import Site, WeightSite

from ._explained_variance import ExplainedVarianceAdapter, initialize_from_inputs, options_of_rank, widest_rank
from ._low_rank import CorrectionAdapter, Init, LoRAAdapter, TuckerAdapter, WeightInitAdapter, factor_pairs

DECOMPOSING_INITS = ("pissa", "olora")  # initialized from the weight


@dataclass(frozen=True)
class LoRA(Method):
    """W' = W + s·B A with s = alpha / rank, A random and B zero initially; only A and B are trained.

    Args:
        rank: rank r of the update, at least 1: A has r rows, B has r columns. In files and code A is `down` and B is `up`.
        alpha: numerator of the scale s (default: the rank, so that s = 1).
        rslora: rank-stabilized: s = alpha / sqrt(rank).
        dropout: probability of dropping an input feature of A in training, in [0, 1).
        init: initialization: with B zero, A is `kaiming` (uniform, a = sqrt 5) or `gaussian` (standard deviation 1 / rank).
            From W, `pissa` is its largest singular values with their vectors, and `olora` the first columns of Q and rows of R
            for W = Q R; then W' = W + s·(B A − B0 A0), with the initial B0, A0 also saved. From training samples, `eva` is the
            largest principal components of the inputs of linear layers, and ranks by the variance that they explain. `loftq`
            is the correction of a layer that was quantized with it (`--quantize nf4+loftq16`), so that s·B A ≈ W − Ŵ.
        pissa_niter: power iterations of a faster, randomized decomposition for `--init pissa`; 0 for the exact one.
        eva_rho: for `--init eva`: highest rank of a site, relative to the average `rank`, at least 1; 1 for equal ranks.
        eva_samples: for `--init eva`: number of training samples, at least 1.
        up_ratio: LoRA+: learning rate of B divided by that of A, such as 16.
        tucker: convolutions with kernels larger than 1×1 get a core C of (rank, rank, *kernel) between 1×1 A and B.

    Convolutions: A has the base's kernel, stride and padding, B is 1×1. Grouped ones: one pair of factors per group, `rank`
    split over the groups. If the groups do not divide the rank, as in most depthwise convolutions, one pair on the flattened
    kernels, B of (d_out, rank) and A of (rank, d_in·k·k / groups), so that all groups share A. Both merge exactly.

    Counts: rank·(d_in·k·k + d_out) / groups per site, with `tucker` rank·(d_in + rank·k·k + d_out) / groups; if all groups
    share A, rank·(d_in·k·k / groups + d_out), with `tucker` rank·(d_in / groups + rank·k·k + d_out). With `eva` at most `eva_rho`
    times as many while it trains, with zeros for the ranks that a site does not get; saved files are without them.

    `eva` runs before the first training step, in `veneer personalize` and `veneer transfer`. A custom training loop calls
    `tuned.select(losses)` before it, with losses of single training samples, and `tuned.finalize()` after the last step.

    Source: Hu et al., LoRA, ICLR 2022, equation 3; Kalajdzievski 2023 (rsLoRA); Hayou et al., ICML 2024 (LoRA+); Meng et al.,
    NeurIPS 2024 (PiSSA); Büyükakyüz 2024 (OLoRA); Paischer et al. 2024 (EVA); Li et al., ICLR 2024 (LoftQ); Yeh et al., ICLR
    2024 (LyCORIS) for `tucker`. `gaussian` with 1/rank follows peft; the paper says only "random Gaussian". Deviations: PiSSA and
    OLoRA replace W by W − s·B0 A0; here W is unchanged and the initial product is subtracted in the forward pass, with equal
    outputs and gradients; convolutions are flattened to (d_out, d_in·k·k), group by group, where peft supports linear layers
    only. peft rejects a rank that groups do not divide. EVA reads a fixed number of samples instead of testing convergence, gives
    every site a rank of 1 at least, and has no whitening; as in peft, inputs are centered, and s does not depend on the rank
    that a site gets. LoftQ's factors are divided by √s, so that s·B A is its product.
    """

    name: ClassVar[str] = "lora"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "style", "classification")
    recommended_for: ClassVar[tuple[str, ...]] = ("few_photos", "style", "classification")
    paper: ClassVar[str] = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    learning_rate: ClassVar[float] = 1e-3
    revision: ClassVar[int] = 2

    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    init: Init = "kaiming"
    pissa_niter: int = 0
    eva_rho: float = 2.0
    eva_samples: int = 32
    up_ratio: float = 1.0
    tucker: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of("lora", "rank", self.rank, "at least 1")
        if not 0 <= self.dropout < 1:
            raise OptionError.of("lora", "dropout", self.dropout, "in [0, 1)")
        if self.init not in get_args(Init):
            raise OptionError.of("lora", "init", self.init, f"one of {', '.join(get_args(Init))}")
        if self.pissa_niter < 0 or (self.pissa_niter and self.init != "pissa"):
            message = f"lora: pissa_niter is for init='pissa' and at least 0, got {self.pissa_niter}, {self.init!r}"
            raise OptionError(message, option="pissa_niter", method=self.name, given=self.pissa_niter)
        for option in ("eva_rho", "eva_samples"):
            if not getattr(self, option) >= 1:
                raise OptionError.of("lora", option, getattr(self, option), "at least 1")
        by_site = self.by_site.values() if isinstance(self.by_site, Mapping) else ()
        inits = (self.init, *(options.get("init") for options in by_site if isinstance(options, Mapping)))
        object.__setattr__(self, "selects", "eva" in inits)
        if self.tucker and self.init in (*DECOMPOSING_INITS, "eva", "loftq"):
            message = f"lora: init={self.init!r} has two factors, but tucker has three. Use one of the options"
            raise OptionError(message, option="tucker", method=self.name, given=self.init)

    @property
    def scaling(self) -> float:
        """s."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @classmethod
    def migrate(cls, config: Mapping[str, Any], revision: int, tensors: Collection[str]) -> dict[str, Any]:
        """Revision 1 had `ranks` and `alphas` by site, and an alpha of 0 stood for the rank.

        Raises:
            ValueError: the options by site are not mappings.
        """
        ranks, alphas = _by_site(config, "ranks"), _by_site(config, "alphas")
        same_order = [p for p in ranks if not p.startswith("name:")] == [p for p in alphas if not p.startswith("name:")]
        by_site: dict[str, Any] = {pattern: {"rank": rank} for pattern, rank in ranks.items()}
        for pattern, alpha in alphas.items():  # later patterns take precedence, in an order of their own: braces make another key
            key = pattern if same_order or pattern.startswith("name:") or pattern not in ranks else f"{{{pattern}}}"
            by_site[key] = {**by_site.get(key, {}), "alpha": alpha}
        for pattern, own in _by_site(config, "by_site").items():
            if isinstance(own, Mapping):
                own = {**by_site.get(pattern, {}), **{k: v or None if k == "alpha" else v for k, v in own.items()}}
            by_site[pattern] = own
        options = {key: value for key, value in config.items() if key not in ("ranks", "alphas")}
        return {**options, "alpha": config.get("alpha") or None, "by_site": by_site}

    def build(self, site: WeightSite) -> LoRAAdapter:
        """A and B for one weight.

        Raises:
            ValueError: with `pissa`, `olora` or `loftq` the rank exceeds that of the weight or the scaling is not positive; with
                `eva` the layer is not linear or not called.
        """
        rank, scaling = self.rank, self.scaling
        if self.init in DECOMPOSING_INITS:
            self._check_decomposition(site, rank, scaling)
            adapter: LoRAAdapter = WeightInitAdapter(site, rank, scaling, self.dropout, self.init, self.pissa_niter)
        elif self.init == "eva":
            return self._build_eva(site)
        elif self.init == "loftq":
            self._check_decomposition(site, rank, scaling)
            adapter = CorrectionAdapter(site, rank, scaling, self.dropout)
        else:
            adapter = (TuckerAdapter if self._tucker_at(site) else LoRAAdapter)(site, rank, scaling, self.dropout)
        for name, parameter in adapter.named_parameters():
            if name != "up" and (self.init == "gaussian" or site.kind == "embedding"):
                nn.init.normal_(parameter, std=1 / rank if self.init == "gaussian" else 1.0)
            elif name != "up":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        return adapter

    def _build_eva(self, site: WeightSite) -> ExplainedVarianceAdapter:
        if site.kind != "linear" or not site.called:
            message = f"lora: init='eva' needs a linear layer that is called; {site.name} is not. Select other sites by where."
            raise OptionError(message, option="init", method=self.name, given=site.kind, expected="linear")
        return ExplainedVarianceAdapter(site, widest_rank(site, self.rank, self.eva_rho), self.scaling, self.dropout)

    def select(self, adapters: Sequence[tuple[Site, Adapter]], losses: Iterable[Tensor]) -> None:
        """Initializes A from the inputs of the layers, with `--init eva`."""
        parts = [(site, adapter) for site, adapter in adapters if isinstance(adapter, ExplainedVarianceAdapter)]
        initialize_from_inputs(parts, [cast(LoRA, self.at(site)).rank for site, _ in parts], losses, self.eva_samples)

    def finalize(self, adapters: Iterable[tuple[Site, Adapter]]) -> LoRA:
        """With `--init eva`, drops the ranks that a site did not get, and returns the config of plain LoRAs; else unchanged."""
        if not self.selects:
            return self
        by_site = {pattern: {**options} for pattern, options in self.by_site.items()}
        for site, adapter in adapters:
            if isinstance(adapter, ExplainedVarianceAdapter):
                options = options_of_rank(adapter.drop_zero_rows(), adapter.scaling, cast(LoRA, self.at(site)).rslora)
                by_site[f"name:{site.name}"] = by_site.get(f"name:{site.name}", {}) | options
        return dataclasses.replace(self, init="kaiming" if self.init == "eva" else self.init, by_site=by_site)

    def _check_decomposition(self, site: WeightSite, rank: int, scaling: float) -> None:
        most = min(math.prod(site.weight_shape[1:]) * factor_pairs(site, rank), site.weight_shape[0])
        if rank > most:
            message = f"init={self.init!r}: the weight has rank {most} at most, less than {rank}; set a lower rank at this site"
            raise OptionError(message, option="rank", method=self.name, given=rank, expected=most)
        if self.init != "olora" and scaling <= 0:
            message = f"init={self.init!r} divides by the scale, which must be above 0; alpha gives {scaling}"
            raise OptionError(message, option="alpha", method=self.name, given=scaling)

    def _tucker_at(self, site: WeightSite) -> bool:
        return self.tucker and math.prod(site.kernel) > 1

    def count(self, site: WeightSite) -> int:
        """rank·(d_in·k·k + d_out) / groups, or that of the Tucker form, or if all groups share A; the highest rank for `eva`."""
        rank, kernel = widest_rank(site, self.rank, self.eva_rho) if self.init == "eva" else self.rank, math.prod(site.kernel)
        width, each = site.d_in // site.groups, rank // factor_pairs(site, rank)
        inner = width + each * kernel if self._tucker_at(site) else width * kernel
        return rank * inner + site.d_out * each

    def groups(self, adapters: Iterable[tuple[Site, Adapter]]) -> list[dict[str, Any]]:
        """A (and C) with the learning rate, B with `up_ratio` times it."""
        if self.up_ratio == 1:
            return super().groups(adapters)
        parameters = [(k, p) for _, a in adapters for k, p in a.named_parameters()]
        return [
            {"params": [p for k, p in parameters if k != "up"], "lr_scale": 1.0},
            {"params": [p for k, p in parameters if k == "up"], "lr_scale": self.up_ratio},
        ]


def _by_site(config: Mapping[str, Any], option: str) -> Mapping[str, Any]:
    found = config.get(option, {})
    if not isinstance(found, Mapping):
        raise OptionError.of("lora", option, found, "a mapping")
    return found

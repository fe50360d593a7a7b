"""Timestep densities: distribution of noise levels in training. Each maps one generator to one u in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, Protocol, get_args

import torch

from veneer.injection.errors import OptionError


class DensityOptions(Protocol):
    """Parameters of the densities; see `ObjectiveOptions`."""

    @property
    def density(self) -> str | None: ...
    @property
    def logit_mean(self) -> float: ...
    @property
    def logit_std(self) -> float: ...
    @property
    def mode_scale(self) -> float: ...
    @property
    def sigmoid_scale(self) -> float: ...


Density = Literal["uniform", "logit_normal", "mode", "cubic", "sigmoid", "shift", "flux_shift"]
DENSITIES = get_args(Density)
"""`uniform` u ~ U(0, 1) · `logit_normal` sigmoid(N(m, s²)) · `mode` 1 − u − s·(cos²(πu/2) − 1 + u) · `cubic` 1 − u³ ·
`sigmoid` sigmoid(s·N(0, 1)) · `shift`, `flux_shift`: as `sigmoid`, then `shift_sigma` or
`shift_sigma_exponentially`."""


def sample(density: str, options: DensityOptions, generator: torch.Generator) -> float:
    """Samples one u from `density`, before any shift; takes exactly one number from `generator`.

    Source: Esser et al. 2024 (SD3), section 3.1, for `logit_normal` and `mode`; Mou et al. 2023 (T2I-Adapter), section 3.4, for
    `cubic`; kohya sd-scripts for `sigmoid`, `shift` and `flux_shift`. u is the noise level, as in the papers; the scripts of
    diffusers take a timestep by its place from the noisy end, so that their logit-normal mean m is −m here.
    Raises:
        OptionError: a density that is not in `DENSITIES`.
    """
    if density in ("logit_normal", "sigmoid", "shift", "flux_shift"):
        z = torch.randn((), generator=generator, dtype=torch.float64).item()
        if density == "logit_normal":
            return _sigmoid(options.logit_mean + options.logit_std * z)
        return _sigmoid(options.sigmoid_scale * z)
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    if density == "uniform":
        return u
    if density == "mode":
        return 1 - u - options.mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
    if density == "cubic":
        return 1 - u**3
    raise unknown("density", density, DENSITIES, "timestep density")


def unknown(option: str, given: str, expected: Iterable[str], words: str) -> OptionError:
    """The error for a name that is not in `expected`; `words` describes the kind of name."""
    known = tuple(expected)
    return OptionError(
        f"unknown {words} {given!r}; expected one of {', '.join(known)}", option=option, given=given, expected=known
    )


def shift_sigma(sigma: float, shift: float) -> float:
    """σ′ = kσ / (1 + (k − 1)σ): more weight on high noise for k > 1. Source: Esser et al. 2024, equation 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shift_sigma_exponentially(sigma: float, mu: float) -> float:
    """σ′ = e^μ / (e^μ + 1/σ − 1), which is `shift_sigma` with k = e^μ. Zero stays zero. Source: Black Forest Labs, flux."""
    return shift_sigma(sigma, math.exp(mu))


def flux_mu(tokens: int, low: float = 0.5, high: float = 1.15, low_tokens: int = 256, high_tokens: int = 4096) -> float:
    """μ of `flux_shift`: linear from `low` at `low_tokens` to `high` at `high_tokens` tokens (latents in 2×2 patches)."""
    return low + (high - low) * (tokens - low_tokens) / (high_tokens - low_tokens)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

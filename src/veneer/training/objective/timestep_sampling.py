"""Timestep densities: how often training visits each noise level. Each maps one generator to one u in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch

from veneer.injection.errors import OptionError


class DensityOptions(Protocol):
    """The numbers that the densities read; see `ObjectiveOptions`."""

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


DENSITIES = ("uniform", "logit_normal", "mode", "cubic", "sigmoid", "shift", "flux_shift")
"""`uniform` u ~ U(0, 1) · `logit_normal` sigmoid(N(m, s²)) · `mode` 1 − u − s·(cos²(πu/2) − 1 + u) · `cubic` 1 − u³ ·
`sigmoid` sigmoid(s·N(0, 1)) · `shift` and `flux_shift`: the same, then shifted (`shifted`, `exponentially_shifted`)."""


def draw(density: str, options: DensityOptions, generator: torch.Generator) -> float:
    """One u from `density`, before any shift; exactly one number is taken from `generator`.

    Source: Esser et al. 2024 (SD3), section 3.1, for `logit_normal` and `mode`; Mou et al. 2023 (T2I-Adapter), section 3.4, for
    `cubic`; kohya sd-scripts for `sigmoid`, `shift` and `flux_shift`. u is the noise level, as in the papers; the scripts of
    diffusers take a timestep by its place from the noisy end, so that their logit-normal mean m is −m here.
    Raises:
        OptionError: for a density that is not in `DENSITIES`.
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
    """The error for a name that is none of `expected`; `words` say what it names."""
    known = tuple(expected)
    return OptionError(f"no {words} {given!r}; there are: {', '.join(known)}", option=option, given=given, expected=known)


def shifted(sigma: float, shift: float) -> float:
    """σ′ = kσ / (1 + (k − 1)σ): more time at high noise for k > 1. Source: Esser et al. 2024, equation 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def exponentially_shifted(sigma: float, mu: float) -> float:
    """σ′ = e^μ / (e^μ + 1/σ − 1), which is `shifted` with k = e^μ. Source: Black Forest Labs, flux sampling; zero stays zero."""
    return shifted(sigma, math.exp(mu))


def flux_mu(tokens: int, low: float = 0.5, high: float = 1.15, low_tokens: int = 256, high_tokens: int = 4096) -> float:
    """μ of `flux_shift`: linear from `low` at `low_tokens` to `high` at `high_tokens` tokens (latents in 2×2 patches)."""
    return low + (high - low) * (tokens - low_tokens) / (high_tokens - low_tokens)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

"""Loss weights of the variance-preserving objectives, as functions of the signal-to-noise ratio.

SNR_t = ᾱ_t / (1 − ᾱ_t). A schedule with zero terminal SNR has SNR_T = 0, where all weights are finite.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from veneer.injection.errors import OptionError

SNR_FLOOR, SNR_CEILING = 1e-5, 1000.0
"""Range to which debiased estimation clamps the SNR: the ceiling is kohya's; the floor, below the SNR of common schedules without
zero terminal SNR, limits the weight to 316."""

SnrWeighting = Literal["none", "min_snr", "min_snr_plus_one", "debiased", "snr_scaled_v"]
FlowWeighting = Literal["none", "sigma_sqrt", "cosmap"]
LossWeighting = Literal[SnrWeighting, FlowWeighting]
SNR_WEIGHTS, FLOW_WEIGHTS = get_args(SnrWeighting), get_args(FlowWeighting)


def snr_weight(weighting: str, prediction: str, snr: Tensor, gamma: float) -> Tensor:
    """Per-sample loss weight for a prediction type.

    ======================  ==============================  ===========================  ===============
    weighting               epsilon                         v_prediction                 sample (x0)
    ======================  ==============================  ===========================  ===============
    `none`                  1                               1                            1
    `min_snr`               min(SNR, γ) / SNR               min(SNR, γ) / (SNR + 1)      min(SNR, γ)
    `min_snr_plus_one`      min(SNR, γ) / SNR               min(SNR, γ) / SNR + 1        –
    `debiased`              1 / √SNR                        1 / (SNR + 1)                –
    `snr_scaled_v`          –                               SNR / (SNR + 1)              –
    ======================  ==============================  ===========================  ===============

    Args:
        prediction: `epsilon`, `v_prediction` or `sample`.
        snr: (batch,), ≥ 0, float32. `gamma`: γ > 0; 5 in the paper.
    Raises:
        OptionError: a combination without an entry (–).

    Source: Hang et al., ICCV 2023 (Min-SNR), section 3.4; `min_snr_plus_one` is what diffusers' SDXL DreamBooth script computes;
    `debiased` is Yu et al. 2023, and `snr_scaled_v` the option of kohya sd-scripts that weights v like noise.
    Deviation: min(SNR, γ)/SNR is computed as γ/max(SNR, γ), its limit 1 at SNR = 0; `debiased` clamps the SNR to
    [`SNR_FLOOR`, `SNR_CEILING`], kohya only from above.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    ratio = gamma / snr.clamp(min=gamma)
    bounded = snr.clamp(SNR_FLOOR, SNR_CEILING)
    table = {
        ("min_snr", "epsilon"): ratio,
        ("min_snr", "v_prediction"): snr.clamp(max=gamma) / (snr + 1),
        ("min_snr", "sample"): snr.clamp(max=gamma),
        ("min_snr_plus_one", "epsilon"): ratio,
        ("min_snr_plus_one", "v_prediction"): ratio + 1,
        ("debiased", "epsilon"): bounded.rsqrt(),
        ("debiased", "v_prediction"): 1 / (bounded + 1),
        ("snr_scaled_v", "v_prediction"): snr / (snr + 1),
    }
    if (weighting, prediction) not in table:
        fits = ["none"] + [w for w, p in table if p == prediction]
        message = f"no loss weight {weighting!r} for a model that predicts {prediction!r}; expected one of {', '.join(fits)}"
        raise OptionError(message, option="weighting", given=weighting, expected=tuple(fits))
    return table[weighting, prediction]


def flow_weight(weighting: str, sigma: Tensor) -> Tensor:
    """Per-sample weight for flow matching: `none` 1, `sigma_sqrt` σ⁻², `cosmap` 2 / (π(1 − 2σ + 2σ²)).

    Args:
        sigma: (batch,), in (0, 1], float32.
    Raises:
        OptionError: unknown weighting.

    Source: Esser et al. 2024 (SD3), section 3.1; `sigma_sqrt` as diffusers computes it.
    """
    if weighting == "none":
        return torch.ones_like(sigma)
    if weighting == "sigma_sqrt":
        return sigma**-2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    message = f"no loss weight {weighting!r} for flow matching; expected one of {', '.join(FLOW_WEIGHTS)}"
    raise OptionError(message, option="weighting", given=weighting, expected=tuple(FLOW_WEIGHTS))

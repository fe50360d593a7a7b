"""Training objectives of denoisers: epsilon, v, sample, or flow prediction.

Everything is computed in float32, whatever the latents' dtype. A timestep `t` is what `sample_timestep` returns: a step index
for the variance-preserving objectives, a noise level σ for `Flow`; batches of them are tensors of shape (batch,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection.errors import OptionError

from . import timestep_sampling
from .loss_weighting import FLOW_WEIGHTS, SNR_WEIGHTS, flow_weight, snr_weight
from .timestep_sampling import unknown


@dataclass(frozen=True)
class ObjectiveOptions:
    """Timestep sampling, loss weighting and prediction type.

    Args:
        density: one of `timestep_sampling.DENSITIES` (default: that of the family).
        logit_mean, logit_std: parameters of `logit_normal`, a density of the noise level (mean above 0: more noise). The scripts
            of diffusers count timesteps from the noisy end: their `--logit_mean` m is −m here. `mode` is symmetric.
        mode_scale: scale of `mode`. `sigmoid_scale`: scale of `sigmoid`, `shift` and `flux_shift`.
        shift: k of σ′ = kσ/(1 + (k−1)σ) for flow models (default: that of the scheduler; 1 if it shifts by resolution).
            Unused by `sigmoid` and `flux_shift`.
        tokens: number of 2×2 latent patches for `flux_shift`, if not passed to `sample_timestep`.
        weighting: one of `loss_weighting.SNR_WEIGHTS` or, for flow models, of `loss_weighting.FLOW_WEIGHTS`.
        gamma: γ of the min-SNR weights.
        prediction: overrides the scheduler's `prediction_type`, for base models with a wrong config.
    Raises:
        OptionError: an unknown name or a value out of range.
    """

    density: str | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    sigmoid_scale: float = 1.0
    shift: float | None = None
    tokens: int = 4096
    weighting: str = "none"
    gamma: float = 5.0
    prediction: str | None = None

    def __post_init__(self) -> None:
        if self.density is not None and self.density not in timestep_sampling.DENSITIES:
            raise unknown("density", self.density, timestep_sampling.DENSITIES, "timestep density")
        if self.weighting not in {*SNR_WEIGHTS, *FLOW_WEIGHTS}:
            names = dict.fromkeys((*SNR_WEIGHTS, *FLOW_WEIGHTS))
            raise unknown("weighting", self.weighting, names, "loss weight")
        for name in ("logit_std", "gamma", "tokens", "shift"):
            given = getattr(self, name)
            if given is not None and not given > 0:
                raise OptionError(f"{name} must be above 0, got {given}", option=name, given=given, expected=0)


class Objective(ABC):
    """Noising, target, timestep density and loss weight of a prediction type.

    Attributes:
        options: the `ObjectiveOptions`. `steps`: T, the number of training timesteps of the scheduler.
        prediction: `prediction_type` of diffusers.
    """

    prediction: ClassVar[str]

    def __init__(self, steps: int, options: ObjectiveOptions) -> None:
        self.steps = steps
        self.options = options

    @abstractmethod
    def sample_timestep(self, generator: torch.Generator, tokens: int | None = None) -> float:
        """Samples one timestep from the density; takes exactly one number from `generator`.

        Args:
            tokens: number of 2×2 latent patches of this sample, for `flux_shift` (default: that of the options).
        """

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy latents x_t, shape of `latents`, float32."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of the prediction for x_t, shape of `latents`, float32."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """Loss weight of each sample, (batch,), float32."""

    @abstractmethod
    def model_input(self, t: Tensor) -> Tensor:
        """The timestep input of the denoiser, (batch,)."""

    @abstractmethod
    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio of each sample, (batch,), float32."""

    def sample_timesteps(self, generators: Sequence[torch.Generator], tokens: int | None = None) -> Tensor:
        """Samples one timestep per generator, (batch,): int64 indices or float32 σ."""
        return torch.tensor([self.sample_timestep(g, tokens) for g in generators])


class VariancePreserving(Objective):
    """x_t = √ᾱ_t·x₀ + √(1 − ᾱ_t)·ε, with t in 0 … T − 1.

    Args:
        alphas_cumprod: ᾱ, (T,).
        options: any density but `shift` and `flux_shift`; a sample u becomes the index ⌊u·T⌋.
    Raises:
        OptionError: options that do not support the prediction type.

    Source: Ho et al. 2020 (DDPM), equation 4.
    """

    def __init__(self, alphas_cumprod: Tensor, options: ObjectiveOptions) -> None:
        super().__init__(len(alphas_cumprod), options)
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float32).clamp(0, 1)
        self.density = options.density or "uniform"
        if self.density in ("shift", "flux_shift"):
            message = f"density {self.density!r} is for flow models; this base model predicts {self.prediction!r}"
            raise OptionError(message, option="density", given=self.density)
        snr_weight(options.weighting, self.prediction, torch.ones(1), options.gamma)

    def sample_timestep(self, generator: torch.Generator, tokens: int | None = None) -> int:
        u = timestep_sampling.sample(self.density, self.options, generator)
        return min(max(int(u * self.steps), 0), self.steps - 1)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ_t, √(1 − ᾱ_t)), each (batch, 1, …) on the device of `like`."""
        alpha = self.alphas_cumprod[t.to("cpu", torch.int64)].to(like.device).view(-1, *[1] * (like.ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, spread = self.scales(t, latents)
        return signal * latents.float() + spread * noise.float()

    def snr(self, t: Tensor) -> Tensor:
        """ᾱ_t / (1 − ᾱ_t)."""
        alpha = self.alphas_cumprod[t.to("cpu", torch.int64)]
        return (alpha / (1 - alpha)).to(t.device)

    def weight(self, t: Tensor) -> Tensor:
        return snr_weight(self.options.weighting, self.prediction, self.snr(t), self.options.gamma)

    def model_input(self, t: Tensor) -> Tensor:
        return t.to(torch.int64)


class Epsilon(VariancePreserving):
    """Predicts the noise: target ε."""

    prediction = "epsilon"

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise.float()


class VPrediction(VariancePreserving):
    """Predicts v = √ᾱ_t·ε − √(1 − ᾱ_t)·x₀. Source: Salimans & Ho 2022, section 4."""

    prediction = "v_prediction"

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, spread = self.scales(t, latents)
        return signal * noise.float() - spread * latents.float()


class Sample(VariancePreserving):
    """Predicts the clean latents: target x₀."""

    prediction = "sample"

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return latents.float()


class Flow(Objective):
    """Rectified flow: x_σ = (1 − σ)·x₀ + σ·ε, target ε − x₀, σ in [1/T, 1].

    Args:
        steps: T; the timestep input of the denoiser is σ·T.
        shift: k of the scheduler, used if the options have none.
        options: any density; `uniform`, `logit_normal`, `mode`, `cubic` and `shift` are shifted by k, `flux_shift` by e^μ.
        mu: (low, high, low_tokens, high_tokens) of `flux_mu`.
    Attributes:
        low, high: range of the noise levels.
    Raises:
        OptionError: a weighting that needs a variance-preserving model.

    Source: Liu et al. 2023 (rectified flow); Esser et al. 2024 (SD3), section 3. Deviation: σ is continuous, whereas
    diffusers samples one of T levels, and clamped at 1/T, the scheduler's last level.
    """

    prediction = "flow_prediction"
    low, high = 0.0, 1.0

    def __init__(
        self,
        options: ObjectiveOptions,
        steps: int = 1000,
        shift: float = 1.0,
        mu: tuple[float, float, int, int] = (0.5, 1.15, 256, 4096),
    ) -> None:
        super().__init__(steps, options)
        self.density = options.density or "uniform"
        self.shift = shift if options.shift is None else options.shift
        self.mu = mu
        flow_weight(options.weighting, torch.ones(1))

    def sample_timestep(self, generator: torch.Generator, tokens: int | None = None) -> float:
        sigma = timestep_sampling.sample(self.density, self.options, generator)
        if self.density == "flux_shift":
            sigma = timestep_sampling.shift_sigma_exponentially(sigma, self.log_shift(tokens or self.options.tokens))
        elif self.density != "sigmoid":
            sigma = timestep_sampling.shift_sigma(sigma, self.shift)
        return min(max(sigma, 1 / self.steps), 1.0)

    def log_shift(self, tokens: int) -> float:
        """μ of `flux_shift` for a number of 2×2 latent patches."""
        return timestep_sampling.flux_mu(tokens, *self.mu)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = t.to(latents.device, torch.float32).view(-1, *[1] * (latents.ndim - 1))
        return (1 - sigma) * latents.float() + sigma * noise.float()

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise.float() - latents.float()

    def snr(self, t: Tensor) -> Tensor:
        """((1 − σ) / σ)²."""
        return ((1 - t.float()) / t.float()) ** 2

    def weight(self, t: Tensor) -> Tensor:
        return flow_weight(self.options.weighting, t.float())

    def model_input(self, t: Tensor) -> Tensor:
        return t.float() * self.steps


def from_scheduler(scheduler: Any, options: ObjectiveOptions | None = None, density: str = "uniform") -> Objective:
    """The objective of a base model, from the config of its scheduler.

    Args:
        scheduler: any diffusers scheduler with `alphas_cumprod` (with or without zero terminal SNR), or a flow-matching one.
        density: density if the options have none.
    Raises:
        OptionError: an unsupported scheduler or prediction type, or incompatible options.
    """
    options = replace(options or ObjectiveOptions(), density=(options.density if options else None) or density)
    config = scheduler.config
    given = options.prediction or config.get("prediction_type", "epsilon")
    if type(scheduler).__name__.startswith("FlowMatch") or given == "flow_prediction":
        dynamic = config.get("use_dynamic_shifting", False)
        shift = 1.0 if dynamic else float(config.get("shift") or config.get("flow_shift") or 1.0)
        keys = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
        mu: Any = tuple(config.get(key) or default for key, default in keys.items())
        return Flow(options, int(config.get("num_train_timesteps", 1000)), shift, mu)
    kinds: dict[str, type[VariancePreserving]] = {k.prediction: k for k in (Epsilon, VPrediction, Sample)}
    if given not in kinds or not hasattr(scheduler, "alphas_cumprod"):
        raise OptionError(
            f"cannot train with {type(scheduler).__name__}(prediction_type={given!r}): expected alphas_cumprod and one of "
            f"{', '.join(kinds)}, or flow matching. Use the scheduler that the base model was trained with.",
            option="prediction",
            method=type(scheduler).__name__,
            given=given,
            expected=tuple(kinds),
        )
    return kinds[given](scheduler.alphas_cumprod, options)

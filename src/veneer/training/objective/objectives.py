"""What a denoiser is trained to predict: epsilon, v, the clean sample, or the velocity of a flow.

All of it in float32, whatever the latents' type. A timestep `t` is what `draw` returns: a step index for the variance-preserving
objectives, a noise level σ for `Flow`; batches of them are tensors of shape (batch,).
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
    """How timesteps are drawn and losses weighted.

    Args:
        density: one of `densities.DENSITIES`, or None for the family's usual one.
        logit_mean, logit_std: of `logit_normal`, a density of the noise level (mean above 0: more noise). The scripts of
            diffusers count timesteps from the noisy end: their `--logit_mean` m is −m here. `mode` is symmetric and the same.
        mode_scale: of `mode`. `sigmoid_scale`: of `sigmoid`, `shift`, `flux_shift`.
        shift: k of σ′ = kσ/(1 + (k−1)σ) for flow models; None for the scheduler's own (1 where it shifts by resolution).
            `sigmoid` and `flux_shift` take no k.
        tokens: latents in 2×2 patches, for `flux_shift` where `draw` is not told.
        weighting: one of `weights.SNR_WEIGHTS` or, for flow models, of `weights.FLOW_WEIGHTS`.
        gamma: γ of the min-SNR weights.
        prediction: overrides the scheduler's `prediction_type`, for a base whose config is wrong.
    Raises:
        OptionError: for an unknown name or a number out of range.
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
        if self.density not in (None, *timestep_sampling.DENSITIES):
            raise unknown("density", self.density, timestep_sampling.DENSITIES, "timestep density")
        if self.weighting not in {*SNR_WEIGHTS, *FLOW_WEIGHTS}:
            names = dict.fromkeys((*SNR_WEIGHTS, *FLOW_WEIGHTS))
            raise unknown("weighting", self.weighting, names, "loss weight")
        for name in ("logit_std", "gamma", "tokens", "shift"):
            given = getattr(self, name)
            if given is not None and not given > 0:
                raise OptionError(f"{name} must be above 0, got {given}", option=name, given=given, expected=0)


class Objective(ABC):
    """Noising, target, timestep density and loss weight of one way to train a denoiser.

    Attributes:
        options: the `ObjectiveOptions`. `steps`: T, the number of training timesteps of the scheduler.
        prediction: the diffusers word for what is predicted.
    """

    prediction: ClassVar[str]

    def __init__(self, steps: int, options: ObjectiveOptions) -> None:
        self.steps = steps
        self.options = options

    @abstractmethod
    def draw(self, generator: torch.Generator, tokens: int | None = None) -> float:
        """One timestep from the density; takes exactly one number from `generator`.

        Args:
            tokens: latents in 2×2 patches of this sample, which `flux_shift` reads; None for the options' number.
        """

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy latents x_t, shape of `latents`, float32."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should say for x_t, shape of `latents`, float32."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """Loss weight of each sample, (batch,), float32."""

    @abstractmethod
    def model_input(self, t: Tensor) -> Tensor:
        """The timestep as the denoiser is given it, (batch,)."""

    @abstractmethod
    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio of each sample, (batch,), float32."""

    def draws(self, generators: Sequence[torch.Generator], tokens: int | None = None) -> Tensor:
        """One timestep for each generator, (batch,): int64 indices or float32 σ."""
        return torch.tensor([self.draw(g, tokens) for g in generators])


class VariancePreserving(Objective):
    """x_t = √ᾱ_t·x₀ + √(1 − ᾱ_t)·ε, with t in 0 … T − 1.

    Args:
        alphas_cumprod: ᾱ, (T,).
        options: density any but `shift` and `flux_shift`; a draw u becomes the index ⌊u·T⌋.
    Raises:
        OptionError: for options that do not fit the prediction.

    Source: Ho et al. 2020 (DDPM), equation 4.
    """

    def __init__(self, alphas_cumprod: Tensor, options: ObjectiveOptions) -> None:
        super().__init__(len(alphas_cumprod), options)
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float32).clamp(0, 1)
        self.density = options.density or "uniform"
        if self.density in ("shift", "flux_shift"):
            message = f"density {self.density!r} is for flow models; this base predicts {self.prediction!r}"
            raise OptionError(message, option="density", given=self.density)
        snr_weight(options.weighting, self.prediction, torch.ones(1), options.gamma)

    def draw(self, generator: torch.Generator, tokens: int | None = None) -> int:
        u = timestep_sampling.draw(self.density, self.options, generator)
        return min(max(int(u * self.steps), 0), self.steps - 1)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ_t, √(1 − ᾱ_t)), each (batch, 1, …) on the device of `like`."""
        alpha = self.alphas_cumprod[t.to("cpu", torch.int64)].to(like.device).view(-1, *[1] * (like.ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
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
        steps: T; the denoiser is given σ·T.
        shift: the scheduler's own k, used where the options give none.
        options: density any; `uniform`, `logit_normal`, `mode`, `cubic` and `shift` are shifted by k, `flux_shift` by e^μ.
        mu: (low, high, low_tokens, high_tokens) of `flux_mu`.
    Raises:
        OptionError: for a weighting that needs a variance-preserving model.

    Source: Liu et al. 2023 (rectified flow); Esser et al. 2024 (SD3), section 3. Deviation: σ is drawn continuously, where
    diffusers picks one of T levels, and kept from falling below 1/T, the scheduler's last level.
    """

    prediction = "flow_prediction"

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

    def draw(self, generator: torch.Generator, tokens: int | None = None) -> float:
        sigma = timestep_sampling.draw(self.density, self.options, generator)
        if self.density == "flux_shift":
            sigma = timestep_sampling.exponentially_shifted(
                sigma, timestep_sampling.flux_mu(tokens or self.options.tokens, *self.mu)
            )
        elif self.density != "sigmoid":
            sigma = timestep_sampling.shifted(sigma, self.shift)
        return min(max(sigma, 1 / self.steps), 1.0)

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
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
    """The objective that a base was trained with, read from its scheduler.

    Args:
        scheduler: any diffusers scheduler with `alphas_cumprod` (rescaled to zero terminal SNR or not) or of flow matching.
        density: used where the options name none.
    Raises:
        OptionError: for a scheduler or prediction type that is neither, or options that do not fit.
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
            f"cannot train with {type(scheduler).__name__}(prediction_type={given!r}): it needs alphas_cumprod and one of "
            f"{', '.join(kinds)}, or flow matching. Give the pipeline the scheduler that its base was trained with.",
            option="prediction",
            method=type(scheduler).__name__,
            given=given,
            expected=tuple(kinds),
        )
    return kinds[given](scheduler.alphas_cumprod, options)

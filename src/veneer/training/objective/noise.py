"""Noise of one sample: plain, offset, pyramid, and input perturbation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.injection.errors import OptionError


@dataclass(frozen=True)
class NoiseOptions:
    """Modifications of ε ~ N(0, 1) (default: none).

    Args:
        offset: o, strength of the noise offset; typically 0.05 to 0.1.
        offset_adaptive: k, added to o per channel as k·|mean of the latents|, with the sum clamped at 0; may be negative.
        offset_random: sample the strength from U(0, o) instead of using o.
        pyramid: discount d of pyramid noise, in [0, 1); typically 0.3. `pyramid_levels`: maximum number of levels, typically 6
            to 10.
        perturbation: γ of input perturbation; typically 0.1.
    Raises:
        OptionError: a value out of range.
    """

    offset: float = 0.0
    offset_adaptive: float = 0.0
    offset_random: bool = False
    pyramid: float = 0.0
    pyramid_levels: int = 6
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        if self.offset < 0 or self.perturbation < 0:
            name = "offset" if self.offset < 0 else "perturbation"
            raise self._wrong(name, "at least 0")
        if not 0 <= self.pyramid < 1:
            raise self._wrong("pyramid", "a discount in [0, 1)")
        if self.pyramid_levels < 1:
            raise self._wrong("pyramid_levels", "at least 1")

    def _wrong(self, name: str, expected: str) -> OptionError:
        given = getattr(self, name)
        return OptionError(f"{name} is {given}; expected {expected}", option=name, given=given, expected=expected)


def sample_noise(latents: Tensor, options: NoiseOptions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples the noise of one sample: (noise of the target, noise of the model input).

    The two differ only with input perturbation: the input has ε + γξ, ξ ~ N(0, 1), the target ε.

    Args:
        latents: (channels, height, width) of one sample; only its shape is used, and its channel means with `offset_adaptive`.
        generator: on the CPU; the noise does not depend on the device of `latents`.
    Returns:
        Two float32 tensors of that shape, on that device. Without options both are the generator's standard normal sample.

    Source: Guttenberg 2023 (noise offset); Whitaker 2023 (multi-resolution noise); Ning et al., ICML 2023 (input perturbation);
    order and adaptive form as in kohya sd-scripts.
    """
    noise = torch.randn(latents.shape, generator=generator)
    if options.offset or options.offset_adaptive:
        noise = noise + _offset(latents, options, generator)
    if options.pyramid:
        noise = pyramid(noise, options.pyramid, options.pyramid_levels, generator)
    input_noise = noise
    if options.perturbation:
        input_noise = noise + options.perturbation * torch.randn(latents.shape, generator=generator)
    return noise.to(latents.device), input_noise.to(latents.device)


def _offset(latents: Tensor, options: NoiseOptions, generator: torch.Generator) -> Tensor:
    """o·n with n ~ N(0, 1) of shape (channels, 1, 1), and o = max(0, o + k·|mean over height and width|)."""
    strength: Tensor | float = options.offset
    if options.offset_random:
        strength = options.offset * torch.rand((), generator=generator)
    if options.offset_adaptive:
        mean = latents.detach().float().mean(dim=(-2, -1), keepdim=True).abs().cpu()
        strength = (strength + options.offset_adaptive * mean).clamp(min=0)
    return strength * torch.randn((latents.shape[0], 1, 1), generator=generator)


def pyramid(noise: Tensor, discount: float, levels: int, generator: torch.Generator) -> Tensor:
    """ε + Σ_i dⁱ·upsample(n_i), divided by its standard deviation; n_i has sides ⌊side / rⁱ⌋ with a new r ~ U(2, 4) per level.

    Args:
        noise: (channels, height, width). `discount`: d. `levels`: maximum; the last level is the first with a side of 1.
    Upsampling is bilinear. Deviation: the standard deviation is that of the sample, in kohya that of the batch, so that a
    sample's noise does not depend on the rest of the batch.
    """
    height, width = noise.shape[-2:]
    total = noise
    for level in range(levels):
        ratio = (2 + 2 * torch.rand((), generator=generator).item()) ** level
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn((1, noise.shape[0], *size), generator=generator)
        total = total + discount**level * F.interpolate(coarse, (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return total / total.std()

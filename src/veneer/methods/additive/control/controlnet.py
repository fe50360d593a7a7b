"""ControlNet: a trainable copy of a UNet's encoder, whose features are added to the skips through zero convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.adapter_forms import Residuals
from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.quantized_weight import float_tensor
from veneer.injection.seams.residual_seam import image_for
from veneer.injection.sites import ResidualSite

from ._control import Controlled

WIDTHS = (16, 32, 96, 256)
PASSED_ARGUMENTS = ("class_labels", "timestep_cond", "attention_mask", "added_cond_kwargs")


@dataclass(frozen=True)
class ControlNet(Controlled):
    """y = F(x; Θ) with skips h_i + Z_i(h_i'), where h' are the features of a copy Θ' of the encoder that reads x + H(c).

    The hint encoder H reduces the control image c to the latent's size by convolutions; its last one and all Z_i, of 1×1, are
    initialized to zero, so that a new ControlNet is the identity. Used with `condition(image=…, strength=…, start=…, end=…,
    guess=…)`. `guess=True`: no control in the unconditional half of the batch, and the skips are weighted from 0.1 at the top to
    1 in the middle, logarithmically spaced.

    Args:
        channels: channels of the control image, at least 1.
        hint: widths of the hint encoder's stages, at least 1, one more than the number of halvings from pixels to latents
            (default: the first of 16, 32, 96, 256).
    Counts: 361,279,120 for SD 1.5, 1,251,014,160 for SDXL.
    Source: Zhang, Rao, Agrawala, ICCV 2023, equation 2 and figure 3. Guess mode is weighted as in diffusers (the paper's code:
    0.825 to the power of the distance from the middle).
    """

    name: ClassVar[str] = "controlnet"
    uses: ClassVar[tuple[str, ...]] = ("control",)
    recommended_for: ClassVar[tuple[str, ...]] = ("control",)
    paper: ClassVar[str] = "Zhang, Rao, Agrawala, Adding Conditional Control to Text-to-Image Diffusion Models, ICCV 2023"
    conditions: ClassVar[tuple[str, ...]] = ("image", "guess")
    learning_rate: ClassVar[float] = 1e-5

    channels: int = 3
    hint: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min((self.channels, *self.hint)) < 1:
            message = f"controlnet: channels and the widths of hint must be at least 1, got {self.channels} and {self.hint}"
            option = "channels" if self.channels < 1 else "hint"
            raise OptionError(message, option=option, method=self.name, given=getattr(self, option))

    def build(self, site: ResidualSite) -> ControlNetAdapter:
        """The copy; it receives the host's weights when it is attached."""
        halvings = round(math.log2(site.pixels))
        hint = self.hint or WIDTHS[: halvings + 1]
        if len(hint) != halvings + 1 or site.encoder is None:
            message = f"hint has {len(hint)} widths; {site.pixels} pixels per latent need {halvings + 1}"
            raise OptionError(message, option="hint", method=self.name, given=len(hint), expected=halvings + 1)
        return ControlNetAdapter(site, site.encoder(self.channels, hint))

    def count(self, site: ResidualSite) -> int:
        """Number of parameters of the copy, counted on the meta device."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.build(site).parameters())


class ControlNetAdapter(Adapter):
    """The copy `net`: a `ControlNetModel` of diffusers."""

    def __init__(self, site: ResidualSite, net: nn.Module) -> None:
        super().__init__()
        self.site, self.net = site, net

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Copies the weights of the host's encoder."""
        if is_init_deferred():
            return
        for name, value in self.net.state_dict().items():
            if not name.startswith("controlnet_"):
                owner, _, param = name.rpartition(".")
                value.copy_(float_tensor(tower, owner, param))

    def residuals(self, call: Mapping[str, Any]) -> Residuals:
        """Z_i(h_i') for every skip, and for the middle."""
        image = image_for(call, self.site, self.conditions, "controlnet")
        guess = bool(self.conditions.options.get("guess"))
        rows = self.conditions.conditioned_rows() if guess else slice(0, None)
        sample, timestep, context = (call[name] for name in self.site.arguments[:3])
        dtype = next(self.net.parameters()).dtype
        net: Any = self.net
        down, middle = net(
            sample[rows].to(dtype), _rows(timestep, rows), context[rows].to(dtype), image[rows].to(dtype), guess_mode=guess,
            return_dict=False, **{name: _rows(call[name], rows) for name in PASSED_ARGUMENTS if call.get(name) is not None},
        )  # fmt: skip
        before = len(sample) - len(middle)
        return Residuals(skips=[_prepend_zeros(before, each) for each in down], middle=_prepend_zeros(before, middle))


def _rows(value: Any, rows: slice) -> Any:
    """The given rows of tensors with a batch dimension; other values unchanged."""
    if isinstance(value, Mapping):
        return {key: _rows(each, rows) for key, each in value.items()}
    return value[rows] if isinstance(value, Tensor) and value.dim() else value


def _prepend_zeros(count: int, features: Tensor) -> Tensor:
    """Zeros for `count` rows, then the features."""
    return torch.cat([features.new_zeros(count, *features.shape[1:]), features]) if count else features

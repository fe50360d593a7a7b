"""EVP: a shrunken image inside a trained border, which is added to black padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import FeatureSite, PixelSite, Site

from ._label_map import LabelMap, fit_label_maps, most_frequent, one_to_one
from ._pixels import SIDE, Border, PixelAdapter, resize, scale_pixels


class _NormalizedGradient(torch.autograd.Function):
    """δ (C, H, W) for each of B images. Backward: ḡ / (‖ḡ‖ + 1e-10), ḡ the mean of the images' gradients."""

    @staticmethod
    def forward(delta: Tensor, batch: int) -> Tensor:
        return delta.repeat(batch, 1, 1, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mean = grad.mean(0)
        return mean / (torch.linalg.vector_norm(mean) + 1e-10), None


class EVPAdapter(PixelAdapter):
    """x' = normalize(pad(shrink(x)) + δ), δ zero in the middle. `prompt`: (C, H·W − h·w), its border row by row."""

    def __init__(self, site: PixelSite, border: Border, normalize: bool) -> None:
        super().__init__(site, border)
        self.normalize = normalize
        self.prompt = nn.Parameter(torch.zeros(site.size[2], border.pixels))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: normalized images (B, C, H, W)."""
        border, (count, channels) = self.border, y.shape[:2]
        black = self.normalize_pixels(torch.zeros_like(self.prompt)).expand(count, -1, -1)
        canvas = border.around(black, resize(y, border.inner, "bicubic").to(black.dtype))
        delta = border.around(self.prompt, self.prompt.new_zeros(channels, *border.inner))
        trained = self.normalize and torch.is_grad_enabled() and delta.requires_grad
        spread = _NormalizedGradient.apply(delta, count) if trained else delta
        return resize(canvas + spread / self.std.unsqueeze(2), y.shape[-2:])


@dataclass(frozen=True)
class EVP(Method):
    """x' = normalize(pad(shrink(x)) + δ), δ on the border only, initialized to zero; labels y' = y[:, index].

    The update of the paper, δ ← δ − lr·mask ∘ ḡ / ‖ḡ‖₂, corresponds to plain SGD here: the gradient of δ is divided by
    its norm over the whole image, middle included, before the border is taken from it. This assumes losses that are means over
    the batch, and whole batches: accumulated gradients each have norm 1. It also cancels the factor of a loss scaler.

    Args:
        border: width of the border in a 224-pixel image; scaled proportionally for other sizes. 1 to 111.
        normalize_gradient: the paper's update; False for the plain gradient.
        classes: n, new classes that labels of the head are mapped to; 0 for as many as the head has. See `prepare`.
        one_to_one: assign each class a distinct label of the head, as ILM-VP does.
    Where: `pixels` and `logits`; on a model without a head, `pixels`. With `where="pixels"` the head is trained normally.
    Images of another size than the model's are padded at that size and resized back.
    Counts: C·(H·W − h·w) with border 30 of 224: 69,840; nothing for labels.
    Source: Wu et al., Unleashing the Power of Visual Prompting at the Pixel Level, TMLR 2024, section 3, and the authors' code.
        They train with SGD without momentum at learning rate 70, cosine, 1,000 epochs, flips and crops. Deviations: images come
        at the model's size and are resized here, where the code reads them at 164; labels are chosen on normalized images with
        the initial border, where the code chooses them on images of 164 pixels that are not normalized and have no border. With
        AdamW, the default optimizer here, dividing a gradient by its norm has almost no effect.
    """

    name: ClassVar[str] = "evp"
    uses: ClassVar[tuple[str, ...]] = ("low_memory",)
    paper: ClassVar[str] = "Wu et al., Unleashing the Power of Visual Prompting at the Pixel Level, TMLR 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(PixelSite), Need(FeatureSite, roles=("logits",)))
    default: ClassVar[tuple[str, ...]] = ("pixels", "logits")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 5e-2
    keeps_head: ClassVar[bool] = True
    prepares: ClassVar[Literal["", "once", "epoch"]] = "once"

    border: int = 30
    normalize_gradient: bool = True
    classes: int = 0
    one_to_one: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.border < SIDE / 2:
            raise OptionError.of("evp", "border", self.border, f"1 to {SIDE // 2 - 1} pixels of {SIDE}")
        if self.classes < 0:
            raise OptionError.of("evp", "classes", self.classes, "0 or more")

    def build(self, site: PixelSite | FeatureSite) -> Adapter:
        """A black border, or a map to the first labels of the head.

        Raises:
            ValueError: the image is too small for a border, or the head has fewer labels than there are classes.
        """
        if isinstance(site, FeatureSite):
            return LabelMap(site, self.classes)
        return EVPAdapter(site, border_of(site, self.border), self.normalize_gradient)

    def count(self, site: PixelSite | FeatureSite) -> int:
        """C·(H·W − h·w); 0 for labels."""
        return site.size[2] * border_of(site, self.border).pixels if isinstance(site, PixelSite) else 0

    def prepare(
        self,
        adapters: Iterable[tuple[Site, Adapter]],
        run: Callable[[Tensor], Any],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        """For each class the label that the head predicts most often for its images; with `one_to_one` as in ILM-VP."""
        fit_label_maps(adapters, run, batches, one_to_one if self.one_to_one else most_frequent)


def border_of(site: PixelSite, width: int) -> Border:
    """A border of `width` of 224 pixels on all sides of a site's images."""
    outer = site.size[:2]
    height, across = (side - 2 * scale_pixels(side, width) for side in outer)
    return Border(outer, (height, across))

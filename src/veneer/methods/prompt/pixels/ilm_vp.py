"""ILM-VP: a shrunken image inside a trained frame, with head labels reassigned every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import FeatureSite, PixelSite, Site

from ._label_map import LabelMap, fit_label_maps, one_to_one
from ._pixels import SIDE, Border, PixelAdapter, resize, scale_pixels


class ILMVPAdapter(PixelAdapter):
    """x' = normalize(shrink(x) inside σ(δ)). `prompt`: δ (C, H·W − h·w), the frame row by row."""

    def __init__(self, site: PixelSite, border: Border) -> None:
        super().__init__(site, border)
        self.prompt = nn.Parameter(torch.zeros(site.size[2], border.pixels))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: normalized images (B, C, H, W)."""
        frame = self.normalize_pixels(self.prompt.sigmoid()).expand(len(y), -1, -1)
        framed = self.border.around(frame, resize(y, self.border.inner).to(frame.dtype))
        return resize(framed, y.shape[-2:])


@dataclass(frozen=True)
class ILMVP(Method):
    """x' = normalize(pad(shrink(x)) + M ∘ σ(δ)), M one on the frame, δ initialized to 0 (gray); labels y' = y[:, index].

    Before every epoch `prepare` counts which labels the head predicts for each class, with the current frame, and assigns each
    class a distinct label: the most frequent pair first.

    Args:
        picture: side of the shrunken image in a 224-pixel one, centered; scaled proportionally for other sizes. 1 to 223.
        classes: n, new classes that labels of the head are mapped to; 0 for as many as the head has.
    Where: `pixels` and `logits`; on a model without a head, `pixels`. With `where="pixels"` the head is trained normally.
    Images of another size than the model's are framed at that size and resized back.
    Counts: C·(H·W − h·w), the frame only, with size 128 of 224: 101,376; nothing for labels.
    Source: Chen et al., Understanding and Improving Visual Prompting: A Label-Mapping Perspective, CVPR 2023, section 4, and the
        authors' code (128; 32 for CIFAR, SVHN and GTSRB). They train with Adam at 0.01, 200 epochs, a tenth of it after 50 % and
        72 %. Deviations: the authors also store δ in the middle, C·H·W parameters, where it has no effect and is not trained;
        images come at the model's size and are shrunk here; their variant for CLIP, which adds a border, is not implemented.
    """

    name: ClassVar[str] = "ilm_vp"
    uses: ClassVar[tuple[str, ...]] = ("low_memory",)
    paper: ClassVar[str] = "Chen et al., Understanding and Improving Visual Prompting: A Label-Mapping Perspective, CVPR 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(PixelSite), Need(FeatureSite, roles=("logits",)))
    default: ClassVar[tuple[str, ...]] = ("pixels", "logits")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2
    keeps_head: ClassVar[bool] = True
    prepares: ClassVar[Literal["", "once", "epoch"]] = "epoch"

    picture: int = 128
    classes: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.picture < SIDE:
            raise OptionError.of("ilm_vp", "picture", self.picture, f"1 to {SIDE - 1} pixels of {SIDE}")
        if self.classes < 0:
            raise OptionError.of("ilm_vp", "classes", self.classes, "0 or more")

    def build(self, site: PixelSite | FeatureSite) -> Adapter:
        """A gray frame, or a map to the first labels of the head.

        Raises:
            ValueError: the image is too small for a frame, or the head has fewer labels than there are classes.
        """
        return LabelMap(site, self.classes) if isinstance(site, FeatureSite) else ILMVPAdapter(site, self._frame(site))

    def count(self, site: PixelSite | FeatureSite) -> int:
        """C·(H·W − h·w); 0 for labels."""
        return site.size[2] * self._frame(site).pixels if isinstance(site, PixelSite) else 0

    def prepare(
        self,
        adapters: Iterable[tuple[Site, Adapter]],
        run: Callable[[Tensor], Any],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        """For each class a distinct label; ties go to the smaller label, then the smaller class."""
        fit_label_maps(adapters, run, batches, one_to_one)

    def _frame(self, site: PixelSite) -> Border:
        height, width, _ = site.size
        return Border((height, width), (scale_pixels(height, self.picture), scale_pixels(width, self.picture)))

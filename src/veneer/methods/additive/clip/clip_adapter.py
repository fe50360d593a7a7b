"""CLIP-Adapter: a small network on the features, blended with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import relu

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import FeatureSite


class CLIPAdapterAdapter(Adapter):
    """f' = r·A(f) + (1 − r)·f, A(f) = ReLU(W2 ReLU(W1 f)). Shapes: W1 `down` (hidden, width), W2 `up` (width, hidden)."""

    def __init__(self, width: int, hidden: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the features (batch, width), before normalization."""
        return self.ratio * relu(self.up(relu(self.down(x)))) + (1 - self.ratio) * y


@dataclass(frozen=True)
class CLIPAdapter(Method):
    """f' = r·A(f) + (1 − r)·f on the features that enter the head, A = ReLU(W2 ReLU(W1 f)), without biases.

    Args:
        ratio: r, weight of the adapted features, 0 to 1; the authors search it per dataset.
        reduction: ratio of the features' width to the hidden width.
    Counts: 2·width·(width / reduction); CLIP ViT-B/16 131,072, RN50 524,288.
    Source: Gao et al., CLIP-Adapter, IJCV 2024, section 3; the ReLU after W2 and r = 0.2 follow the authors' code. Initialized
    as torch's linear layers. Deviation: image adapter only, as in that code; the paper also has a text adapter.
    """

    name: ClassVar[str] = "clip_adapter"
    uses: ClassVar[tuple[str, ...]] = ("few_labels",)
    paper: ClassVar[str] = "Gao et al., CLIP-Adapter: Better Vision-Language Models with Feature Adapters, IJCV 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(FeatureSite, roles=("features",)),)
    default: ClassVar[tuple[str, ...]] = ("vision/features",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-3

    ratio: float = 0.2
    reduction: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise OptionError.of("clip_adapter", "ratio", self.ratio, "in [0, 1]")
        if self.reduction < 1:
            raise OptionError.of("clip_adapter", "reduction", self.reduction, "at least 1")

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """Small models have few features, and if few hidden units remain, all of them may be dead."""
        return cls(reduction=1), cls(reduction=1, ratio=0.5)

    def _hidden(self, site: FeatureSite) -> int:
        if site.width < self.reduction:
            message = f"reduction {self.reduction} leaves no hidden unit for {site.width} features"
            raise OptionError(message, option="reduction", method=self.name, given=self.reduction, expected=site.width)
        return site.width // self.reduction

    def build(self, site: FeatureSite) -> CLIPAdapterAdapter:
        """W1 and W2.

        Raises:
            ValueError: no hidden unit would be left.
        """
        return CLIPAdapterAdapter(site.width, self._hidden(site), self.ratio)

    def count(self, site: FeatureSite) -> int:
        """2·width·(width / reduction)."""
        return 2 * site.width * self._hidden(site)

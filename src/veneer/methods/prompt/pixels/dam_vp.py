"""DAM-VP: several prompts that are added to the image border; each image uses the prompt of its nearest cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError, UnsupportedSite
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import FeatureSite, PixelSite, Site

from ._clusters import Clusters, evaluation_mode
from ._label_map import SelectedColumns
from ._pixels import SIDE, Border, PixelAdapter, resize
from .evp import border_of

NOISE = 512  # noise images for selecting the active features


class DAMVPAdapter(PixelAdapter):
    """x' = x + δ_c on the border, c the image's cluster. `prompt`: (M, C, H·W − h·w). The model runs an extra time, for c."""

    applies_strength: ClassVar[bool] = True
    shared: Clusters

    def __init__(self, site: PixelSite, border: Border, clusters: int, std: float) -> None:
        super().__init__(site, border)
        self.path, self.size = site.port.path, site.size
        start = torch.randn(site.size[2], border.pixels) * std
        self.prompt = nn.Parameter(start.repeat(clusters, 1, 1))
        self.__dict__["inner"] = None

    def enter(self, tower: nn.Module) -> None:
        """Keeps a reference to the module that maps images to features; not a submodule, because it contains this adapter."""
        inside = f"{self.shared.place}.".startswith(f"{self.path}.")
        self.__dict__["inner"] = tower.get_submodule(self.path) if inside else tower

    def leave(self) -> None:
        """Drops the reference to the model."""
        self.__dict__["inner"] = None

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: normalized images (B, C, H, W)."""
        if self.shared.capturing:
            return y
        inner = self.__dict__["inner"]
        with evaluation_mode(inner):
            features = self.shared.features(inner, y)
        prompt = self.prompt[self.shared.nearest(features)] * self.strength
        added = self.border.around(prompt, prompt.new_zeros(*prompt.shape[:2], *self.border.inner))
        return y + resize(added, y.shape[-2:])


class FeatureCapture(Adapter):
    """Captures the features and returns the input unchanged."""

    applies_strength: ClassVar[bool] = True
    shared: Clusters

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: features."""
        self.shared.capture(x)
        return y


class ActiveFeatures(SelectedColumns):
    """y'[:, j] = x[:, index[j]]: features x replace the logits y."""

    shared: Clusters

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: features (B, width); y: logits."""
        self.shared.capture(x)
        return self.select(x.flatten(1), y)


@dataclass(frozen=True)
class DAMVP(Method):
    """x' = x + δ_c, δ_c on the border, c the prototype nearest to the features of x itself; prototypes are means of clusters.

    `prepare` clusters the features that the model without prompts gives for training images; before it there is one cluster.
    Each forward pass runs the model twice, first for the features, without a graph and in `eval` mode; other attachments apply in
    both. The model's hooks also run twice. In a mixed batch it applies to all samples or to none.

    Args:
        clusters: M, number of prompts; maximum number of clusters.
        threshold: distance above which clusters are not merged, on the features' scale (the authors: 10 for ViT-B of
            ImageNet-21k, 31 for ViT-B of ImageNet-1k, 20 for Swin-B, 18 for MoCo v3, 21 for ResNet-50); 0 for M clusters.
        samples: number of images that are clustered, the first ones.
        border: width of the border in a 224-pixel image; scaled proportionally for other sizes. 1 to 111.
        std: standard deviation of the initialization N(0, std²), the same sample for all prompts, in normalized pixels; 0 for the
            identity.
        head_free: the most active features replace the logits, those that vary most over noise images; no head is needed.
        classes: n, of `head_free`; 0 for as many as the head has.
    Where: `pixels`, and `features` or `logits` (for `head_free`), where the features are captured.
    For images of another size than the model's, the prompt is resized.
    Counts: M·C·(H·W − h·w), with border 30 of 224: 69,840·M.
    Source: Huang et al., Diversity-Aware Meta Visual Prompting, CVPR 2023, sections 3.2 and 3.3, and the authors' code. They
        train with SGD, momentum 0.9, a head at 0.1. Deviations: no meta-training on other datasets (load the prompts of another
        run to initialize from them); M bounds the clusters, so that sizes are known before the data is; the default threshold of
        0 always gives M clusters, where the code always has a threshold.
    """

    name: ClassVar[str] = "dam_vp"
    uses: ClassVar[tuple[str, ...]] = ("low_memory",)
    paper: ClassVar[str] = "Huang et al., Diversity-Aware Meta Visual Prompting, CVPR 2023"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(PixelSite, where={"tower": "vision"}),
        Need(FeatureSite, roles=("features", "logits"), where={"tower": "vision"}),
    )
    default: ClassVar[tuple[str, ...]] = ("pixels", "features", "logits")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2
    shared_options: ClassVar[tuple[str, ...]] = ("clusters", "head_free")
    prepares: ClassVar[Literal["", "once", "epoch"]] = "once"

    clusters: int = 8
    threshold: float = 0.0
    samples: int = 1000
    border: int = 30
    std: float = 1.0
    head_free: bool = False
    classes: int = 0

    def __post_init__(self) -> None:
        for name, least in {"clusters": 1, "threshold": 0, "samples": 1, "std": 0, "classes": 0}.items():
            if getattr(self, name) < least:
                raise OptionError.of("dam_vp", name, getattr(self, name), f"{least} or more")
        if not 1 <= self.border < SIDE / 2:
            raise OptionError.of("dam_vp", "border", self.border, f"1 to {SIDE // 2 - 1} pixels of {SIDE}")
        if self.classes and not self.head_free:
            message = f"dam_vp: classes={self.classes} without head_free; expected 0, because the head defines the classes"
            raise OptionError(message, option="classes", method=self.name, given=self.classes, expected=0)

    def build_shared(self, sites: Sequence[Site]) -> Clusters:
        """The prototypes of a tower.

        Raises:
            UnsupportedSite: pixels or features are not among the sites, or logits for `head_free`.
        """
        heads = [site for site in sites if isinstance(site, FeatureSite)]
        missing = {
            "pixels": any(isinstance(site, PixelSite) for site in sites),
            "features": bool(heads),
            "logits": not self.head_free or any(_is_logits(site) for site in sites),
        }
        lacks = [role for role, there in missing.items() if not there]
        if lacks:
            names = ", ".join(site.name for site in sites)
            raise UnsupportedSite(
                f"dam_vp: {names}: {' and '.join(lacks)} must be among the sites. Select them, or use another model.",
                method="dam_vp",
                given=tuple(site.name for site in sites),
                expected=tuple(lacks),
            )
        return Clusters(self.clusters, heads[0].width, heads[0].port.path)

    def build(self, site: PixelSite | FeatureSite) -> Adapter:
        """The prompts, or the adapter that captures the features.

        Raises:
            ValueError: the image is too small for a border, or there are fewer features than classes.
        """
        if isinstance(site, PixelSite):
            return DAMVPAdapter(site, border_of(site, self.border), self.clusters, self.std)
        return ActiveFeatures(site, site.width, self.classes) if self.head_free and _is_logits(site) else FeatureCapture()

    def count(self, site: PixelSite | FeatureSite) -> int:
        """M·C·(H·W − h·w); 0 for features."""
        if isinstance(site, FeatureSite):
            return 0
        return self.clusters * site.size[2] * border_of(site, self.border).pixels

    def prepare(
        self,
        adapters: Iterable[tuple[Site, Adapter]],
        run: Callable[[Tensor], Any],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        """Clusters the first `samples` images by their features; selects the active features if they replace the logits.

        Raises:
            ValueError: no images. StateError: the adapters are disabled.
        """
        parts = [adapter for _, adapter in adapters]
        prompts = next(adapter for adapter in parts if isinstance(adapter, DAMVPAdapter))
        clusters, rows, count = prompts.shared, [], 0
        for pictures, _ in batches:
            rows.append(clusters.features(run, pictures))
            count += len(pictures)
            if count >= self.samples:
                break
        if not rows:
            raise OptionError("dam_vp: no images to cluster", option="batches", method="prepare", given=0)
        clusters.gather(torch.cat(rows)[: self.samples], self.threshold)
        active = [adapter for adapter in parts if isinstance(adapter, ActiveFeatures)]
        if active:
            found = most_active(lambda noise: clusters.features(run, noise), prompts.size, pictures)
            for adapter in active:
                adapter.index.copy_(found[: len(adapter.index)].sort().values)


def most_active(features: Callable[[Tensor], Tensor], size: tuple[int, int, int], like: Tensor) -> Tensor:
    """Features sorted by descending variation over noise images N(0, 1), sampled with a fixed seed."""
    height, width, channels = size
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randn(n, channels, height, width, generator=generator) for n in (32,) * (NOISE // 32)]
    rows = torch.cat([features(piece.to(like)) for piece in pieces])
    return rows.std(0, unbiased=False).argsort(descending=True, stable=True)


def _is_logits(site: Site) -> bool:
    return site.role == "logits"

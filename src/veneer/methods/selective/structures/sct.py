"""SCT: a linear layer on the channels with the largest features, after the attention of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite, Site


class SCTAdapter(Adapter):
    """y'_S = y_S + W z_S + b with z = x + y. `weight_s` (K, K), `bias_s` (K,); buffer `index` (K,): S, ascending.

    While `labels` is set, to the classes of each image, y' is y, and the squares of z are added up for each class.
    """

    applies_strength: ClassVar[bool] = True
    index: Tensor

    def __init__(self, site: BranchSite, channels: int) -> None:
        super().__init__()
        self.site = site
        self.weight_s = nn.Parameter(torch.empty(channels, channels))
        self.bias_s = nn.Parameter(torch.zeros(channels))
        self.register_buffer("index", torch.arange(channels))
        self.labels: list[list[int]] | None = None
        self.is_loaded = False
        self.squares: dict[int, Tensor] = {}

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the stream before the branch; y: the branch, both in the site's layout."""
        z = x + y
        if self.labels is not None:
            self._add_squares(z, self.labels)
            return y
        dim = 1 if self.site.layout == "NCHW" else -1
        strength = self.strength
        selected = z.index_select(dim, self.index).movedim(dim, -1)
        change = F.linear(selected, self.weight_s * strength, self.bias_s * strength).movedim(-1, dim)
        return y.index_add(dim, self.index, change.to(y.dtype))

    def _add_squares(self, z: Tensor, labels: list[list[int]]) -> None:
        """Adds the sums of squares over the positions of each image, without class and register tokens."""
        z = z.flatten(2).mT if self.site.layout == "NCHW" else z.flatten(1, -2)[:, self.site.prefix_tokens :]
        for classes, row in zip(labels, z.double().square().sum(1), strict=True):
            for label in classes:
                self.squares[label] = self.squares[label] + row if label in self.squares else row

    def select_channels(self) -> None:
        """Sets S to the channels with the largest mean over the classes of their Euclidean norm, and clears the sums."""
        norms = torch.stack([row.sqrt() for row in self.squares.values()]).mean(0)
        self.index.copy_(norms.topk(len(self.index)).indices.sort().values)
        self.labels, self.squares = None, {}

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Checks the channels of a file.

        Raises:
            OptionError: they are not ascending, or out of range.
        """
        index = tensors.get("index")
        if index is None or index.is_meta:
            return
        first, last, width = int(index[0]), int(index[-1]), self.site.width
        if first < 0 or last >= width or bool((index[1:] <= index[:-1]).any()):
            message = f"the channels of the file are {first} to {last}; expected ascending ones from 0 to {width - 1}"
            raise OptionError(message, option="index", given=(first, last), expected=(0, width - 1))

    def after_load(self) -> None:
        """Keeps S, which W and b were trained for, in a later `SCT.prepare`."""
        self.is_loaded = True


@dataclass(frozen=True)
class SCT(Method):
    """z'_S = z_S + W z_S + b: z the stream after the attention, S the K channels of the block with the largest features.

    `Attachment.prepare` runs the model without adapters over the training data: the norm of each channel over all patches of the
    images of a class, averaged over the classes, is its salience; an image with several labels counts in each of its classes.
    Before it, S is the first K channels. S is saved, and adapters that were loaded from a file keep it.

    Args:
        channels: K, number of channels, at least 1; a branch with fewer channels uses all of them.
        std: standard deviation of the initial W, at least 0; with 0 a new adapter leaves the output unchanged. b is zero.
    Counts: K² + K per block; ViT-B/16 111,744.
    Source: Zhao et al., SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels, IJCV 2024, and the
    authors' code (`sct_attn`), whose forward pass has no scale of the change. Deviations: other branches may be
    selected, also of convolutional networks; if a host has a gate after the branch, z is taken before the gate.
    Raises:
        OptionError: in `prepare`, if there are no images.
    """

    name: ClassVar[str] = "sct"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = (
        "Zhao et al., SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels, IJCV 2024"
    )
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("attn",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2
    prepares: ClassVar[Literal["", "once", "epoch"]] = "once"

    channels: int = 96
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise OptionError.of(self.name, "channels", self.channels, "at least 1")
        if self.std < 0:
            raise OptionError.of(self.name, "std", self.std, "at least 0")

    def build(self, site: BranchSite) -> SCTAdapter:
        """W and b for one branch, on its first channels."""
        adapter = SCTAdapter(site, min(self.channels, site.width))
        nn.init.trunc_normal_(adapter.weight_s, std=self.std) if self.std else nn.init.zeros_(adapter.weight_s)
        return adapter

    def count(self, site: BranchSite) -> int:
        """K² + K."""
        channels = min(self.channels, site.width)
        return channels * channels + channels

    def prepare(
        self,
        adapters: Iterable[tuple[Site, Adapter]],
        run: Callable[[Tensor], Any],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        """Selects the channels of every adapter from the features of the training data.

        Raises:
            OptionError: no images.
        """
        parts = [adapter for _, adapter in adapters if isinstance(adapter, SCTAdapter) and not adapter.is_loaded]
        if not parts:
            return
        try:
            for images, labels in batches:
                for adapter in parts:
                    adapter.labels = _classes_of(labels)
                run(images)
            if not all(adapter.squares for adapter in parts):
                raise OptionError("sct: no images to select channels from", option="batches", method="prepare", given=0)
            for adapter in parts:
                adapter.select_channels()
        finally:
            for adapter in parts:
                adapter.labels, adapter.squares = None, {}


def _classes_of(labels: Tensor) -> list[list[int]]:
    """The classes of each image. `labels`: (B,) indices, or (B, classes) with 1 for each of several labels."""
    return [[label] for label in labels.tolist()] if labels.ndim == 1 else [row.nonzero().flatten().tolist() for row in labels]

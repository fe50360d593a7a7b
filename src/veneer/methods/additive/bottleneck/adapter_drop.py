"""AdapterDrop: bottlenecks trained so that those of the lower layers can be left out at inference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.attachment.attachment import Attachment
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite, Site

from ._bottleneck import OutputBottleneck, count_bottleneck

UNSET = -1
"""Value of `lowest` before the first step."""


def sample_layers(seed: int, step: int, most: int) -> int:
    """n in 0 … most, uniform: a function of its arguments, equal on all machines and processes."""
    digest = hashlib.sha256(f"{seed},{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (most + 1)


class LayerOrder(nn.Module):
    """Index of each layer among the adapted layers of one tower, by depth."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        depths = sorted({site.depth for site in sites if site.depth is not None})
        self.index = {depth: i for i, depth in enumerate(depths)}


class DroppedBottleneck(OutputBottleneck):
    """y' = y + A(y) from layer n on, y' = y below. Training state: `lowest` (), the n of the current step.

    `skip`: layers without an adapter in evaluation mode, from the first.
    """

    training_buffers: ClassVar[tuple[str, ...]] = ("lowest",)
    lowest: Tensor
    shared: LayerOrder

    def __init__(self, site: BranchSite, bottleneck: int, most: int, seed: int, skip: int) -> None:
        super().__init__(site, bottleneck, "relu")
        self.depth, self.most, self.seed, self.skip = site.depth, most, seed, skip
        self.register_buffer("lowest", torch.full((), UNSET), persistent=False)
        self._read: tuple[Tensor, int, int] = self.lowest, self.lowest._version, UNSET

    @property
    def layer(self) -> int:
        """Index of this layer among the adapted ones."""
        return 0 if self.depth is None else self.shared.index[self.depth]

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the branch. Below layer n nothing is computed, and no gradient is needed there."""
        below = self.first_layer() if self.training else self.skip
        return y if self.layer < below else super().output(x, y)

    def first_layer(self) -> int:
        """n of the current step. The buffer is read only after a change, because that synchronizes with its device."""
        tensor, version, n = self._read
        if not self.lowest.is_meta and (tensor is not self.lowest or version != tensor._version):
            n = int(self.lowest)
            self._read = self.lowest, self.lowest._version, n
        return self._sample(1) if n == UNSET else n

    def set_step(self, step: int) -> None:
        """Samples n for a step, counted from 1."""
        n = self._sample(step)
        self.lowest.fill_(n)
        self._read = self.lowest, self.lowest._version, n

    def _sample(self, step: int) -> int:
        layers = len(self.shared.index)
        return sample_layers(self.seed, step, layers - 1 if self.most < 0 else min(self.most, layers - 1))


def skip_layers(tuned: Attachment, layers: int) -> None:
    """Leaves out the adapters of the first layers in evaluation mode, for faster inference. Files saved after it do so too.

    Args:
        tuned: an attachment of this method.
        layers: number of layers without adapters, from the first; 0 for none.
    Raises:
        OptionError: the number is negative, or the attachment is of another method.
    """
    if not isinstance(tuned.method, AdapterDrop):
        given = tuned.method.name
        message = f"skip_layers: '{tuned.name}' is {given}; expected {AdapterDrop.name}, which is trained with layers left out."
        raise OptionError(message, option="layers", where=tuned.name, given=given, expected=AdapterDrop.name)
    tuned.method = replace(tuned.method, skip=layers)
    for _, adapter in tuned.parts.values():
        assert isinstance(adapter, DroppedBottleneck)
        adapter.skip = layers


@dataclass(frozen=True)
class AdapterDrop(Method):
    """y' = y + Up(ReLU(Down(y))) in the layers l ≥ n, y' = y below: y the MLP; n is sampled uniformly for each training step.

    Robust AdapterDrop: one set of adapters works with any number of lower layers left out. In training no gradient is computed
    below layer n. In evaluation mode all adapters act, or those from layer `skip` on. It can be set after training, for a file by
    `veneer predict --skip-layers 5` and `veneer generate --skip-layers 5`, and in Python before saving:

        from veneer.methods.additive.bottleneck.adapter_drop import skip_layers

        skip_layers(tuned, 5)

    Specialized AdapterDrop, with a fixed n, is a selection by depth: `where="mlp@5:"` with `most=0`.

    `veneer transfer` and `veneer personalize` sample n. A custom training loop calls `tuned.after_step(step, steps)` after each
    optimizer step, with `step` from 1 to `steps`; without it n stays that of the first step.

    Args:
        reduction: h = width // reduction, at least 1.
        most: largest n; −1 for the number of adapted layers minus 1, 0 for no dropping.
        seed: of the samples of n, which are a function of seed and step: equal in all processes, and after a resume.
        skip: layers without adapters in evaluation mode, from the first; 0 for none.
    Layers are counted by depth among the adapted ones of each tower.
    Counts: 2·width·h + h + width per block, h = width // reduction; ViT-B/16 894,528 with h = 48, and 521,808 in the upper seven.
    Source: Rücklé et al., AdapterDrop: On the Efficiency of Adapters in Transformers, EMNLP 2021, section 3; n uniform in 0 to 11
    of 12 layers. Adapters and initialization as in `pfeiffer`. Deviation: n is sampled for an optimizer step, as in AdapterHub's
    example, which samples 0 to 10, so all parts of an accumulated batch have the same n.
    """

    name: ClassVar[str] = "adapter_drop"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Rücklé et al., AdapterDrop: On the Efficiency of Adapters in Transformers, EMNLP 2021"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite, where={"depth": ...}),)
    default: ClassVar[tuple[str, ...]] = ("mlp",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    shared_options: ClassVar[tuple[str, ...]] = ("most", "seed", "skip")

    reduction: int = 16
    most: int = -1
    seed: int = 0
    skip: int = 0

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise OptionError.of(self.name, "reduction", self.reduction, "at least 1")
        if self.most < -1:
            raise OptionError.of(self.name, "most", self.most, "at least -1")
        if self.skip < 0:
            raise OptionError.of(self.name, "skip", self.skip, "at least 0")

    @classmethod
    def examples(cls) -> tuple[AdapterDrop, AdapterDrop]:
        """Without dropping, so that every adapter trains in each step, and wide enough in small models."""
        return cls(reduction=2, most=0), cls(reduction=4, most=0)

    def build_shared(self, sites: Sequence[Site]) -> LayerOrder:
        """The order of the layers."""
        return LayerOrder(sites)

    def build(self, site: BranchSite) -> DroppedBottleneck:
        """Down and Up for one branch."""
        adapter = DroppedBottleneck(site, self._width(site), self.most, self.seed, self.skip)
        for weight in (adapter.down, adapter.up):
            nn.init.normal_(weight, std=0.02)
        return adapter

    def _width(self, site: BranchSite) -> int:
        return max(1, site.width // self.reduction)

    def count(self, site: BranchSite) -> int:
        """2·width·h + h + width."""
        return count_bottleneck(site.width, self._width(site))

    def after_step(self, adapters: Iterable[tuple[Site, Adapter]], step: int, steps: int) -> None:
        """Sets n of the next step."""
        for _, adapter in adapters:
            assert isinstance(adapter, DroppedBottleneck)
            adapter.set_step(step + 1)

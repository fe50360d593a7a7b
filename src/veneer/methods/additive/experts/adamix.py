"""AdaMix: a bottleneck after every MLP with several experts, sampled in training and averaged at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.functional.channels import add_channels_product, channels_product
from veneer.injection.method import Need
from veneer.injection.sites import BranchSite
from veneer.methods.additive.bottleneck._bottleneck import activate, check_bottleneck_options

from ._experts import ExpertAdapter, ExpertMethod, stack_of


class AdaMixAdapter(ExpertAdapter):
    """y' = y + Up_j(GELU(Down_i(y))). Shapes: `down` (M, h, width), `down_bias` (M, h), `up` (M, width, h), `up_bias` (M, width);
    M is 1 for a shared projection."""

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[Literal["write"]] = "write"

    def __init__(self, site: BranchSite, bottleneck: int, downs: int, ups: int) -> None:
        super().__init__(site)
        down, up = nn.Parameter(torch.empty(bottleneck, site.width)), nn.Parameter(torch.empty(site.width, bottleneck))
        for matrix in (down, up):
            nn.init.normal_(matrix, std=0.02)
        self.down, self.up = stack_of(down, downs), stack_of(up, ups)
        self.down_bias = nn.Parameter(torch.zeros(downs, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(ups, site.width))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the branch, in the site's layout."""
        layout, (down, bias) = self.site.layout, (self.expert(self.down, 0), self.expert(self.down_bias, 0))
        z = activate(channels_product(x, down, bias, layout), "gelu")
        up, shift = self.expert(self.up, 1) * self.strength, self.expert(self.up_bias, 1) * self.strength
        return add_channels_product(y, z, up, shift, layout)


@dataclass(frozen=True)
class AdaMix(ExpertMethod):
    """y' = y + Up_j(GELU(Down_i(y))): y the MLP branch, i and j sampled for each training pass and site among M experts.

    With `consistency` c, each batch has a second pass with other experts, and the loss is L(f₁) + c·D(f₁, f₂): D is
    ½ (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)) of a classifier's predictions, or the mean squared difference of two noise predictions. In
    evaluation the experts are averaged, and after training only their average is saved: a single bottleneck.

    Args:
        bottleneck: h, width between Down and Up, at least 1.
        experts: M, at least 1.
        share_down: all experts have the same Down.
        share_up: all experts have the same Up.
        consistency: c, weight of the consistency loss, at least 0; 0 saves the second pass.
    In a training loop of your own: `attachment.begin_pass(seed, step, number)` before each forward pass,
    `attachment.consistency_loss` for the term D, and `attachment.finalize()` after the last step.
    The experts of a pass are a hash of seed, step, pass and site: the same on all processes, after a resume and if recomputed.
    Counts: M·(width·h + h) + width·h + width per branch with a shared Up, after training 2·width·h + h + width; ViT-B/16 747,264
    and 304,320 with h = 16, M = 4.
    Source: Wang et al., AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning, EMNLP 2022, equations 3 to 6, and
    the authors' code: matrices from a normal distribution with 0.02, biases zero, equal copies at the start, the target of each
    KL without gradient. Deviations: the code's `init_weights` initializes each copy of a pretrained model separately; its
    experts that a pass does not use have no gradient in the first step, here zeros. The squared difference for diffusion is ours.
    """

    name: ClassVar[str] = "adamix"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Wang et al., AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning, EMNLP 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("mlp",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    shared_options: ClassVar[tuple[str, ...]] = ("consistency",)

    bottleneck: int = 16
    experts: int = 4
    share_down: bool = False
    share_up: bool = True
    consistency: float = 1.0

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck)
        self.check_expert_options()

    def build(self, site: BranchSite) -> AdaMixAdapter:
        """M equal experts for one branch."""
        return AdaMixAdapter(site, self.bottleneck, *self.stacks())

    def count(self, site: BranchSite) -> int:
        """M·(width·h + h) + width·h + width with a shared Up."""
        downs, ups = self.stacks()
        return downs * (site.width + 1) * self.bottleneck + ups * site.width * (self.bottleneck + 1)

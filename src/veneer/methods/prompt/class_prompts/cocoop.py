"""CoCoOp: learned context vectors of CLIP prompts, shifted by the image features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import normalize

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import PromptSite

from ._context import ContextAdapter, check_prompt_options, context_length


class CoCoOpAdapter(ContextAdapter):
    """W'(x) = the normalized text features of the prompts with v + h(norm(x)) as context: (batch, classes, features)."""

    def __init__(self, site: PromptSite, tokens: int, words: str, hidden: int) -> None:
        super().__init__(site, tokens, words, "end", by_class=False)
        self.net = nn.Sequential(nn.Linear(site.features, hidden), nn.ReLU(), nn.Linear(hidden, site.width))

    def weights(self, features: Tensor) -> Tensor:
        """One set of class weights for each image's features (batch, features)."""
        context = self.context + self.net(normalize(features, dim=-1)).unsqueeze(-2)
        return self.encode(context.unsqueeze(1).expand(-1, len(self.ids), -1, -1))


@dataclass(frozen=True)
class CoCoOp(Method):
    """Prompt of class k for image x: [start] v_1 + h(f) … v_M + h(f) name_k . [end], f the image's normalized features.

    h = Linear(D, D / 16), ReLU, Linear(D / 16, width). The text tower encodes each class once per image: batch·classes
    prompts in a forward pass, so that batches must be small (the authors use 1). Strength as for `coop`.

    Args:
        words: initial words of the context v; M is their number of tokens. Empty: N(0, 0.02²).
        tokens: M, if there are no words.
        reduction: ratio of D to the hidden width of h.
    Counts: M·width + (D + 1)·D / 16 + (D / 16 + 1)·width; CLIP ViT-B/16 35,360, RN50 100,928.
    Source: Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022, section 3.2.
    """

    name: ClassVar[str] = "cocoop"
    uses: ClassVar[tuple[str, ...]] = ("few_labels",)
    paper: ClassVar[str] = "Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(PromptSite),)
    default: ClassVar[tuple[str, ...]] = ("prompts",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-3

    words: str = "a photo of a"
    tokens: int = 4
    reduction: int = 16

    def __post_init__(self) -> None:
        check_prompt_options(self.name, self.tokens, "end")
        if self.reduction < 1:
            raise OptionError.of("cocoop", "reduction", self.reduction, "at least 1")

    @classmethod
    def examples(cls) -> tuple[CoCoOp, CoCoOp]:
        """For features with few channels."""
        return cls(reduction=2), cls(words="", tokens=3, reduction=4)

    def _hidden(self, site: PromptSite) -> int:
        if site.features < self.reduction:
            message = f"reduction {self.reduction} leaves no hidden unit for {site.features} features"
            raise OptionError(message, option="reduction", method=self.name, given=self.reduction, expected=site.features)
        return site.features // self.reduction

    def build(self, site: PromptSite) -> CoCoOpAdapter:
        """M vectors and h.

        Raises:
            ValueError: a prompt is too long for the text tower, or h has no hidden unit.
        """
        return CoCoOpAdapter(site, context_length(self.words, self.tokens, site), self.words, self._hidden(site))

    def count(self, site: PromptSite) -> int:
        """M·width, and the weights and biases of h."""
        hidden = self._hidden(site)
        context = context_length(self.words, self.tokens, site) * site.width
        return context + (site.features + 1) * hidden + (hidden + 1) * site.width

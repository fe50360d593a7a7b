"""CoCoOp: learned words of a CLIP's prompts, moved by what is in the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import normalize

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import PromptSite

from ._context import ContextAdapter, check, length


class CoCoOpAdapter(ContextAdapter):
    """W'(x) = the normalised text features of the prompts with v + h(norm(x)) as context: (batch, classes, features)."""

    def __init__(self, site: PromptSite, tokens: int, words: str, hidden: int) -> None:
        super().__init__(site, tokens, words, "end", by_class=False)
        self.net = nn.Sequential(nn.Linear(site.features, hidden), nn.ReLU(), nn.Linear(hidden, site.width))

    def weights(self, features: Tensor) -> Tensor:
        """For each picture's features (batch, features)."""
        context = self.context + self.net(normalize(features, dim=-1)).unsqueeze(-2)
        return self.encode(context.unsqueeze(1).expand(-1, len(self.ids), -1, -1))


@dataclass(frozen=True)
class CoCoOp(Method):
    """Prompt of class k for picture x: [start] v_1 + h(f) … v_M + h(f) name_k . [end], f the picture's normalised features.

    h = Linear(D, D / 16), ReLU, Linear(D / 16, width). The text tower reads each class once for each picture: batch·classes
    prompts in a pass, so that batches are small (the authors' are 1). Strength as for `coop`.

    Args:
        words: what the context v begins as; M is their number of tokens. Empty: N(0, 0.02²).
        tokens: M, where there are no words.
        reduction: of the hidden width of h against D.
    Counts: M·width + (D + 1)·D / 16 + (D / 16 + 1)·width; CLIP ViT-B/16 35,360, RN50 100,928.
    Source: Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022, section 3.2.
    """

    name: ClassVar[str] = "cocoop"
    paper: ClassVar[str] = "Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(PromptSite),)
    default: ClassVar[tuple[str, ...]] = ("prompts",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-3

    words: str = "a photo of a"
    tokens: int = 4
    reduction: int = 16

    def __post_init__(self) -> None:
        check(self.name, self.tokens, "end")
        if self.reduction < 1:
            raise OptionError.of("cocoop", "reduction", self.reduction, "at least 1")

    @classmethod
    def examples(cls) -> tuple[CoCoOp, CoCoOp]:
        """For features of few channels."""
        return cls(reduction=2), cls(words="", tokens=3, reduction=4)

    def _hidden(self, site: PromptSite) -> int:
        if site.features < self.reduction:
            message = f"reduction {self.reduction} leaves nothing of {site.features} features"
            raise OptionError(message, option="reduction", method=self.name, given=self.reduction, expected=site.features)
        return site.features // self.reduction

    def build(self, site: PromptSite) -> CoCoOpAdapter:
        """M vectors and h.

        Raises:
            ValueError: a prompt is longer than the text tower reads, or h has no hidden channel.
        """
        return CoCoOpAdapter(site, length(self.words, self.tokens, site), self.words, self._hidden(site))

    def count(self, site: PromptSite) -> int:
        """M·width, and the weights and biases of h."""
        hidden = self._hidden(site)
        context = length(self.words, self.tokens, site) * site.width
        return context + (site.features + 1) * hidden + (hidden + 1) * site.width

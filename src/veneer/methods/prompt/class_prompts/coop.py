"""CoOp: learned context vectors around the class name in a CLIP prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from veneer.injection.method import Method, Need
from veneer.injection.sites import PromptSite

from ._context import ContextAdapter, Position, check_prompt_options, context_length


class CoOpAdapter(ContextAdapter):
    """W' = the normalized text features of the prompts with the learned context: (classes, features)."""

    def weights(self, features: Tensor) -> Tensor:
        """The same for all images."""
        return self.encode(self.context if self.context.dim() == 3 else self.context.expand(len(self.ids), -1, -1))


@dataclass(frozen=True)
class CoOp(Method):
    """Prompt of class k: [start] v_1 … v_M name_k . [end]; v are learned input embeddings of the text tower, all else is frozen.

    The prompts replace the classifier's own templates. At strength s the class weights are W + s·(W' − W), with W' of
    the learned prompts and W of the templates; several add up, so that two at strength ½ give their mean. They are encoded
    in each forward pass.

    Args:
        tokens: M, context vectors.
        by_class: a separate context per class ("CSC"); such a file is for these classes only, one with a common context for any.
        position: position of the name: after the context, in its middle (after M // 2 vectors) or before it.
        words: initial words of the context, such as `a photo of a`; M is then their number of tokens. Empty: N(0, 0.02²).
    Counts: M·width, times the classes with `by_class`; CLIP RN50 and ViT-B/16 8,192.
    Source: Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, section 3; initialization and the full stop
    follow the authors' code. Deviations: with `words` and `by_class` each class has its own context, initialized from the
    words, where the code ignores "CSC" and trains one common context (leave `by_class` out); M is the number of tokens of the
    words, where the code counts words.
    """

    name: ClassVar[str] = "coop"
    uses: ClassVar[tuple[str, ...]] = ("few_labels", "smallest_file")
    recommended_for: ClassVar[tuple[str, ...]] = ("few_labels",)
    paper: ClassVar[str] = "Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(PromptSite),)
    default: ClassVar[tuple[str, ...]] = ("prompts",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-3

    tokens: int = 16
    by_class: bool = False
    position: Position = "end"
    words: str = ""

    def __post_init__(self) -> None:
        check_prompt_options(self.name, self.tokens, self.position)

    @classmethod
    def examples(cls) -> tuple[CoOp, CoOp]:
        """For text towers with short prompts."""
        return cls(tokens=4, position="middle"), cls(by_class=True, words="a photo of")

    def build(self, site: PromptSite) -> CoOpAdapter:
        """M vectors, or M per class.

        Raises:
            ValueError: a prompt is too long for the text tower.
        """
        return CoOpAdapter(site, context_length(self.words, self.tokens, site), self.words, self.position, self.by_class)

    def count(self, site: PromptSite) -> int:
        """M·width, times the classes with `by_class`."""
        return context_length(self.words, self.tokens, site) * site.width * (len(site.classes) if self.by_class else 1)

"""DART: trained template words and label words in the prompts of classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import PromptSite, Site

from ..class_prompts._context import ContextAdapter, context_length


class DARTAdapter(ContextAdapter):
    """Class weights of prompts [start] v_1 … v_M l_k . [end]. `context`: v (M, width); `labels`: l of all classes (words, width).

    `label_ids` (words,): the ids of the label words, from which `labels` are initialized.
    """

    label_ids: Tensor

    def __init__(self, site: PromptSite, tokens: int, words: str) -> None:
        super().__init__(site, tokens, words, "end", by_class=False)
        names = label_ids(site)
        with torch.device("cpu"):
            self.register_buffer("label_ids", torch.tensor([i for ids in names for i in ids]), persistent=False)
            first = tokens
            for which, ids in zip(self.which, names, strict=True):
                which[1 + tokens : 1 + tokens + len(ids)] = torch.arange(first, first + len(ids))
                first += len(ids)
        self.labels = nn.Parameter(torch.zeros(len(self.label_ids), site.width))

    def enter(self, tower: nn.Module) -> None:
        """Copies the token embeddings of the template and of the label words."""
        super().enter(tower)
        if not is_init_deferred() and not self.labels.is_meta:
            with torch.no_grad():
                self.labels.copy_(self.texts.bare(self.label_ids))

    def weights(self, features: Tensor) -> Tensor:
        """The same class weights for all images, (classes, features)."""
        return self.encode(torch.cat([self.context, self.labels]).expand(len(self.ids), -1, -1))

    def distance(self) -> Tensor:
        """Mean over classes of 1 − cos(w_k, w⁰_k), with w⁰ of the classifier's own prompts, without gradient."""
        with torch.no_grad():
            own = self.texts.forward(self.context)
        weights = self.weights(self.context)
        return (1 - F.cosine_similarity(weights, own.to(weights.dtype), dim=-1)).mean()


def label_ids(site: PromptSite) -> list[list[int]]:
    """For each class the ids of its words as they are in the prompt, where punctuation may be one token with the full stop."""
    return [site.tokenizer.tokens(f"{name}.")[: len(site.tokenizer.tokens(name))] for name in site.classes]


@dataclass(frozen=True)
class DART(Method):
    """Prompt of class k: [start] v_1 … v_M l_k . [end]: the template words v and the words l_k of each class name are trained.

    Both are copies of token embeddings at the start, so that a new adapter is the classifier of the template `words {}.`. The
    loss has the term fluency·mean_k (1 − cos(w_k, w⁰_k)), w the class weights and w⁰ those of the classifier's own templates:
    it keeps the trained words close to language. The saved words are for these classes only.

    Args:
        words: template before the class name; M is its number of tokens. Empty: N(0, 0.02²).
        tokens: M, if there are no words.
        fluency: weight of the distance of the class embeddings from those of real words, at least 0; above 0 each training step
            encodes the prompts twice.
    In a training loop of your own: add `attachment.penalty()` to the loss.
    Counts: (M + number of tokens of all class names)·width; CLIP ViT-B/16 with ten class names of two tokens 12,288.
    Source: Zhang et al., Differentiable Prompt Makes Pre-trained Language Models Better Few-shot Learners, ICLR 2022, section 3,
    and the authors' code (copies of embeddings as trained rows). Deviations: CLIP has no masked-word model, so the fluency
    constraint, there a masked-word loss with a sampled label in the prompt, is the distance to the text features of real words;
    the tower is frozen, where the authors train the whole model; class names have all of their tokens, not only the first.
    """

    name: ClassVar[str] = "dart"
    uses: ClassVar[tuple[str, ...]] = ("few_labels", "smallest_file")
    paper: ClassVar[str] = (
        "Zhang et al., Differentiable Prompt Makes Pre-trained Language Models Better Few-shot Learners, ICLR 2022"
    )
    needs: ClassVar[tuple[Need, ...]] = (Need(PromptSite),)
    default: ClassVar[tuple[str, ...]] = ("prompts",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-3
    shared_options: ClassVar[tuple[str, ...]] = ("fluency",)

    words: str = "a photo of a"
    tokens: int = 4
    fluency: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise OptionError.of(self.name, "tokens", self.tokens, "at least 1")
        if self.fluency < 0:
            raise OptionError.of(self.name, "fluency", self.fluency, "at least 0")

    @classmethod
    def examples(cls) -> tuple[DART, DART]:
        """With and without words."""
        return cls(), cls(words="", tokens=3, fluency=0.0)

    def build(self, site: PromptSite) -> DARTAdapter:
        """M vectors, and one for each token of the class names.

        Raises:
            TextError: a prompt is too long for the text tower.
        """
        return DARTAdapter(site, context_length(self.words, self.tokens, site), self.words)

    def count(self, site: PromptSite) -> int:
        """(M + number of tokens of all class names)·width."""
        labels = sum(map(len, label_ids(site)))
        return (context_length(self.words, self.tokens, site) + labels) * site.width

    def penalty(self, adapters: Iterable[tuple[Site, Any]]) -> Tensor | None:
        """fluency·mean_k (1 − cos(w_k, w⁰_k)), or None without it."""
        distances = [adapter.distance() for _, adapter in adapters] if self.fluency else []
        return self.fluency * torch.stack(distances).sum() if distances else None

"""PEZ: CLIP prompts of real tokens, found by gradients at the nearest rows of the token-embedding table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from veneer.functional.nearest_rows import nearest_rows, random_rows
from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.method import Method, Need
from veneer.injection.sites import PromptSite, Site

from ._context import ContextAdapter, Position, check_prompt_options, context_length


class PEZAdapter(ContextAdapter):
    """W' = the normalized text features of the prompts with the tokens that are nearest to the context vectors."""

    def __init__(self, site: PromptSite, tokens: int, words: str, position: Position) -> None:
        super().__init__(site, tokens, words, position, by_class=False)
        self.special = [site.tokenizer.start, site.tokenizer.end]

    def enter(self, tower: Any) -> None:
        """Finds the text tower, and initializes the context with the rows of `words`, or of random tokens."""
        super().enter(tower)
        if not self.words and not is_init_deferred() and not self.context.is_meta:
            with torch.no_grad():
                tokens = random_rows(len(self.context), len(self.texts.table), self.special)
                self.context.copy_(self.texts.bare(tokens.to(self.context.device)))

    @torch.no_grad()
    def nearest(self) -> tuple[Tensor, Tensor]:
        """Ids (M,) and rows (M, width) of the tokens with the largest cosine similarity to the context vectors."""
        table = self.texts.table
        ids = nearest_rows(self.context, table, self.special)
        return ids, table[ids].to(self.context.dtype)

    def weights(self, features: Tensor) -> Tensor:
        """The same for all images. The gradient at the rows of the tokens is that of the context."""
        rows = self.nearest()[1] + (self.context - self.context.detach())
        return self.encode(rows.expand(len(self.ids), -1, -1))


@dataclass(frozen=True)
class PEZ(Method):
    """v_m = E[argmax_i cos(p_m, E_i)], ∂L/∂p_m := ∂L/∂v_m: prompts [start] v_1 … v_M name_k . [end] of real tokens.

    E is the token-embedding table. The continuous vectors p are trained, the prompts have their nearest tokens at all times.
    `report()` has the text, which works without any file as the template `TEXT {}.` if the tokenizer splits it into the same
    tokens. After training p are the rows of the tokens.

    The prompts replace the classifier's own templates; strength as for `coop`. `veneer personalize --method pez` searches such a
    text for photos: L is 1 minus their CLIP similarity, there is no name, and the result is a prompt instead of an adapter.

    Args:
        tokens: M, tokens of the prompt, at least 1.
        position: position of the name: after the tokens, in their middle (after M // 2) or before them.
        words: initial words, such as `a photo of a`; M is then their number of tokens. Empty: random tokens.
    Counts: M·width; CLIP ViT-B/16 8,192 with M = 16. A prompt is M integers.
    Source: Wen et al., Hard Prompts Made Easy, NeurIPS 2023, algorithm 1, and the authors' code: cosine similarity, initial
    values from random tokens, AdamW with rate 0.1. Deviations: a classifier has its own loss instead of the similarity to images;
    the weight decay is that of the command, in the code 0.1 (`--weight-decay 0.1`); the start and end token are left out; the
    epoch with the best validation score is kept, where the code keeps the best step.
    """

    name: ClassVar[str] = "pez"
    uses: ClassVar[tuple[str, ...]] = ("few_labels", "smallest_file")
    paper: ClassVar[str] = "Wen et al., Hard Prompts Made Easy, NeurIPS 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(PromptSite),)
    default: ClassVar[tuple[str, ...]] = ("prompts",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 0.1

    tokens: int = 16
    position: Position = "end"
    words: str = ""

    def __post_init__(self) -> None:
        check_prompt_options(self.name, self.tokens, self.position)

    @classmethod
    def examples(cls) -> tuple[PEZ, PEZ]:
        """For text towers with short prompts."""
        return cls(tokens=4), cls(words="a photo of")

    def build(self, site: PromptSite) -> PEZAdapter:
        """M vectors.

        Raises:
            ValueError: a prompt is too long for the text tower.
        """
        return PEZAdapter(site, self.length(site), self.words, self.position)

    def length(self, site: PromptSite) -> int:
        """M, by the words if there are any."""
        return context_length(self.words, self.tokens, site)

    def count(self, site: PromptSite) -> int:
        """M·width."""
        return self.length(site) * site.width

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Sets the vectors to the rows of their tokens."""
        for _, adapter in adapters:
            with torch.no_grad():
                adapter.context.copy_(adapter.nearest()[1])
        return self

    def summary(self, adapters: Iterable[tuple[Site, Any]]) -> str:
        """The text of the prompt, or the ids of its tokens if the tokenizer cannot decode them."""
        texts = []
        for site, adapter in adapters:
            if isinstance(site, PromptSite) and not adapter.context.is_meta and "texts" in adapter.__dict__:
                ids = adapter.nearest()[0].tolist()
                texts.append(f"prompt: {site.tokenizer.text(ids) or ids}")
        return "; ".join(texts)

"""Soft prompts at the input of a tower: tokens beside the patches of an image, or vectors in the prompts of classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Need
from veneer.injection.sites import PromptSite, TokenSite

from ..class_prompts._context import ContextAdapter, Position

NEEDS = (Need(TokenSite, roles=("tokens.tower",), where={"can_insert": True}), Need(PromptSite))
FREQUENT = 5000
"""Number of token embeddings from which initial vectors are sampled: tokens are sorted by frequency."""


class TokenPrompts(Adapter):
    """Inserts p vectors after the prefix tokens of a sequence (B, N, width) and removes them at the end of the tower."""

    def __init__(self, site: TokenSite, tokens: int) -> None:
        super().__init__()
        self.prefix, self.tokens = site.prefix_tokens, tokens

    def vectors(self) -> Tensor:
        """(p, width)."""
        raise NotImplementedError

    def insert(self, tokens: Tensor) -> Tensor:
        """(B, N, width) to (B, N + p, width)."""
        prompt = self.vectors().to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, : self.prefix], prompt, tokens[:, self.prefix :]], dim=1)

    def remove(self, tokens: Tensor) -> Tensor:
        """(B, N + p, width) to (B, N, width)."""
        return torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix + self.tokens :]], dim=1)


class TextPrompts(ContextAdapter):
    """Class weights of prompts with the same p vectors for all classes; `context` (p, width) is a table of them.

    Args:
        texts: words of the first vectors: the mean of the token embeddings of each. `from_table`: the others are embeddings of
            frequent tokens, sampled without replacement if they suffice; otherwise `context` keeps its initialization.
    """

    def __init__(
        self, site: PromptSite, tokens: int, position: Position, texts: Sequence[str] = (), from_table: bool = False
    ) -> None:
        super().__init__(site, tokens, "", position, by_class=False)
        self.initial = [site.tokenizer.tokens(text) for text in texts][:tokens]
        self.from_table = from_table

    def enter(self, tower: torch.nn.Module) -> None:
        """Initializes the vectors from the text tower's token embeddings."""
        super().enter(tower)
        if is_init_deferred() or self.context.is_meta:
            return
        with torch.no_grad():
            if self.from_table:
                table = self.texts.bare(slice(FREQUENT))
                count, replace = len(self.context), len(self.context) > len(table)
                rows = torch.randint(len(table), (count,)) if replace else torch.randperm(len(table))[:count]
                self.context.copy_(table[rows.to(table.device)])
            for i, ids in enumerate(self.initial):
                self.context[i] = self.texts.bare(torch.tensor(ids, device=self.context.device)).mean(0)

    def vectors(self) -> Tensor:
        """(p, width)."""
        return self.context

    def weights(self, features: Tensor) -> Tensor:
        """The same class weights for all images, (classes, features)."""
        return self.encode(self.vectors().expand(len(self.ids), -1, -1))


def check_tokens(name: str, tokens: int) -> None:
    """Raises `OptionError` for no tokens."""
    if tokens < 1:
        raise OptionError.of(name, "tokens", tokens, "at least 1")

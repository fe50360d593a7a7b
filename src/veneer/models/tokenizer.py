"""Texts to the ids of a text tower, whatever tokenizer it has, and without a text cut short in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.injection.errors import VeneerError

Tokenizer = Callable[..., Tensor]


class TextError(VeneerError, ValueError):
    """Texts that a text tower cannot read whole."""


class Words:
    """A tokenizer of open_clip: `tokenizer(texts, context_length=n)` gives ids (len(texts), n), padded or cut.

    Args:
        tokenizer: as `open_clip.get_tokenizer` gives it. `length`: tokens of a prompt, start and end included.

    Attributes:
        start, end, pad: ids around a text: start, its tokens, end, and pad up to the length.
        brackets: True if the tokenizer does put texts between `start` and `end`.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        empty, full = self._rows(["", "a"], length).tolist()
        self.start, self.end, self.pad = empty[0], empty[1], empty[-1]
        self.brackets = self.start != self.end and full[0] == self.start and full[2] == self.end and full[-1] == self.pad

    def __deepcopy__(self, memo: Any) -> Words:
        """Itself: nothing of it changes."""
        return self

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Ids (len(texts), length).

        Raises:
            TextError: texts that do not fit, with the tokens that they have.
        """
        long, ids = self._rows(texts, 8 * self.length), self._rows(texts, self.length)
        past = long[:, self.length :]
        fits = (long[:, : self.length] == ids).all(1) & (past == long[:, -1:]).all(1)
        if not fits.all():
            bad = [(texts[i], int((long[i] != long[i, -1]).sum())) for i in (~fits).nonzero().flatten().tolist()]
            self.refuse(bad)
        return ids

    def tokens(self, text: str) -> list[int]:
        """Ids of a text's own tokens, without start and end; of any number."""
        long: list[int] = self._rows([text], 4 * len(text) + 8)[0].tolist()
        return long[1 : long.index(self.end, 1)]

    def row(self, tokens: Sequence[int]) -> Tensor:
        """Ids (length,) of a prompt with these tokens, which fit."""
        ids = [self.start, *tokens, self.end]
        return torch.tensor(ids + [self.pad] * (self.length - len(ids)), device="cpu")

    def _rows(self, texts: Sequence[str], length: int) -> Tensor:
        with torch.device("cpu"):  # ids are read here, also while a model is built elsewhere
            return self.tokenizer(list(texts), context_length=length)

    def refuse(self, texts: Sequence[tuple[str, int]]) -> None:
        """Raise `TextError` for texts with as many tokens, start and end included or about so."""
        told = ", ".join(f"{text if len(text) < 90 else text[:80] + '…'!r} ({count} tokens)" for text, count in texts[:3])
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        raise TextError(
            f"the text tower reads {self.length} tokens, start and end included, and {told}{more} do not fit. "
            "Shorten the names of these classes, the template, or the learned context.",
            where="tokens",
            given=tuple(texts),
            expected=self.length,
        )

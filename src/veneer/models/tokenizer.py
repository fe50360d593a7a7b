"""Tokenizer of a CLIP's text tower that raises an error instead of truncating texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.injection.errors import VeneerError

Tokenizer = Callable[..., Tensor]


class TextError(VeneerError, ValueError):
    """Texts that are too long for a text tower, or invalid prompt templates."""


class PromptTokenizer:
    """Wraps an open_clip tokenizer, whose `tokenizer(texts, context_length=n)` returns ids (len(texts), n), padded or truncated.

    Args:
        tokenizer: as returned by `open_clip.get_tokenizer`. `length`: context length in tokens, with start and end token.

    Attributes:
        start, end, pad: special token ids: start, the text's tokens, end, and pad up to the length.
        brackets: True if the tokenizer encloses texts in `start` and `end`.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        empty, full = self._rows(["", "a"], length).tolist()
        self.start, self.end, self.pad = empty[0], empty[1], empty[-1]
        self.brackets = self.start != self.end and full[0] == self.start and full[2] == self.end and full[-1] == self.pad

    def __deepcopy__(self, memo: Any) -> PromptTokenizer:
        """The same object, because it is immutable."""
        return self

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Ids (len(texts), length).

        Raises:
            TextError: texts that are too long, with their token counts.
        """
        long = self._rows(texts, 8 * self.length)
        ids, past = long[:, : self.length].clone(), long[:, self.length :]
        doubtful = (long[:, self.length - 1 :] != long[:, -1:]).any(1).nonzero().flatten()  # others end in padding
        if len(doubtful):
            short = self._rows([texts[i] for i in doubtful.tolist()], self.length)
            complete = (ids[doubtful] == short).all(1) & (past[doubtful] == long[doubtful, -1:]).all(1)
            if bad := [(texts[i], int((long[i] != long[i, -1]).sum())) for i in doubtful[~complete].tolist()]:
                self.raise_too_long(bad)
        return ids

    def tokens(self, text: str) -> list[int]:
        """Ids of a text without start and end token, of any length."""
        long: list[int] = self._rows([text], 4 * len(text) + 8)[0].tolist()
        return long[1 : long.index(self.end, 1)]

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, or an empty one if the tokenizer cannot decode: open_clip's own and transformers' tokenizers can."""
        inner = self.tokenizer if hasattr(self.tokenizer, "decode") else getattr(self.tokenizer, "tokenizer", None)
        return str(inner.decode(list(ids))).strip() if inner is not None else ""

    def row(self, tokens: Sequence[int]) -> Tensor:
        """Ids (length,) of a prompt with these tokens, which must not exceed the length."""
        ids = [self.start, *tokens, self.end]
        return torch.tensor(ids + [self.pad] * (self.length - len(ids)), device="cpu")

    def _rows(self, texts: Sequence[str], length: int) -> Tensor:
        with torch.device("cpu"):  # also under another default device, because ids are read here
            return self.tokenizer(list(texts), context_length=length)

    def raise_too_long(self, texts: Sequence[tuple[str, int]]) -> None:
        """Raises `TextError` for texts with approximate token counts, start and end token included."""
        listing = ", ".join(f"{text if len(text) < 90 else text[:80] + '…'!r} ({count} tokens)" for text, count in texts[:3])
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        raise TextError(
            f"text too long: {listing}{more}; expected at most {self.length} tokens with start and end token. "
            "Shorten the class names, the template, or the learned context.",
            where="tokens",
            given=tuple(texts),
            expected=self.length,
        )

"""Learned context vectors in class prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.sites import PromptSite

Position = Literal["end", "middle", "front"]
POSITIONS = ("end", "middle", "front")
PLACEHOLDER = "X"


class ContextAdapter(Adapter):
    """Class weights from prompts [start] v_1 … v_M name . [end], encoded in each pass. v is `context`: ([classes,] M, width).

    `ids` (classes, length) are the prompts with placeholders, `which` (classes, length) the index of the context vector at each
    position, −1 for none. Words beyond M follow the context and stay as they are.
    """

    ids: Tensor
    which: Tensor
    texts: Any

    def __init__(self, site: PromptSite, tokens: int, words: str, position: Position, by_class: bool) -> None:
        super().__init__()
        ids = site.tokenizer.tokens(words)
        self.path, self.words = site.path, ids[:tokens]
        with torch.device("cpu"):
            rows = prompts(site, tokens, position, ids[tokens:])
        self.register_buffer("ids", torch.stack([ids for ids, _ in rows]), persistent=False)
        self.register_buffer("which", torch.stack([which for _, which in rows]), persistent=False)
        shape = (len(site.classes), tokens) if by_class else (tokens,)
        self.context = nn.Parameter(torch.empty(*shape, site.width))
        nn.init.normal_(self.context, std=0.02)

    def enter(self, tower: nn.Module) -> None:
        """Finds the text tower, and initializes the context from the token embeddings of `words`, if given."""
        self.__dict__["texts"] = tower.get_submodule(self.path)  # a plain attribute, not a submodule
        if self.words and not is_init_deferred() and not self.context.is_meta:
            with torch.no_grad():
                self.context.copy_(self.texts.bare(torch.tensor(self.words, device=self.context.device)))

    def leave(self) -> None:
        """Drops the reference to the text tower."""
        self.__dict__.pop("texts", None)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the image features; y: the class weights so far, including changes by other attachments."""
        weights = self.weights(x)
        return weights if self.texts.alone else weights + (y - self.texts.forward(x).to(y.dtype))

    @abstractmethod
    def weights(self, features: Tensor) -> Tensor:
        """Class weights ([batch,] classes, features)."""

    def encode(self, context: Tensor, between: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Normalized text features (…, classes, features) with the context ([…,] classes, M, width) in the prompts.

        Args:
            between: changes the input (n, length, width) of block i > 0 of the text tower.
        """
        rows = self.texts.embed(self.ids)
        place = self.which.clamp(min=0).unsqueeze(-1)
        learned = context.gather(-2, place.expand(*context.shape[:-2], -1, context.shape[-1]))
        rows = torch.where((self.which >= 0).unsqueeze(-1), learned.to(rows.dtype), rows)
        ids = self.ids.expand(rows.shape[:-1])
        found: Tensor = self.texts.encode(ids.reshape(-1, ids.shape[-1]), rows.flatten(0, -3), between)
        return found.unflatten(0, rows.shape[:-2])


def prompts(site: PromptSite, tokens: int, position: Position, rest: Sequence[int] = ()) -> list[tuple[Tensor, Tensor]]:
    """For each class the ids (length,) of its prompt with placeholders, and the index of the context vector at each position.

    Args:
        rest: ids between the context and the name; only for the position `end`.
    Raises:
        ValueError: a prompt is too long.
    """
    words = site.tokenizer
    hold: Sequence[int] = words.tokens(PLACEHOLDER)[:1] * tokens
    ends = [[*rest, *words.tokens(f"{name}.")] for name in site.classes]
    long = [(name, len(end) + tokens + 2) for name, end in zip(site.classes, ends, strict=True)]
    long = [(name, length) for name, length in long if length > words.length]
    if long:
        words.raise_too_long([(f"{tokens} context vectors and {name}.", length) for name, length in long])
    found, before = [], {"end": tokens, "middle": tokens // 2, "front": 0}[position]
    for name, end in zip(site.classes, ends, strict=True):
        name_length = len(words.tokens(name)) if position != "end" else len(end)
        ids = words.row([*hold[:before], *end[:name_length], *hold[before:], *end[name_length:]])
        which = torch.full_like(ids, -1)
        which[1 : 1 + before] = torch.arange(before)
        which[1 + before + name_length : 1 + name_length + tokens] = torch.arange(before, tokens)
        found.append((ids, which))
    return found


def context_length(words: str, tokens: int, site: PromptSite) -> int:
    """M: the number of tokens of `words`, or `tokens` without words."""
    return len(site.tokenizer.tokens(words)) if words else tokens


def check_prompt_options(name: str, tokens: int, position: str) -> None:
    """Raises `ValueError` for invalid prompt options."""
    if tokens < 1:
        raise OptionError.of(name, "tokens", tokens, "at least 1")
    if position not in POSITIONS:
        raise OptionError.of(name, "position", position, f"one of {', '.join(POSITIONS)}")

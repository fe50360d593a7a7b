"""Prompts in both towers of a CLIP: before the first blocks of the text tower and of the image tower."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.multimodal_prompt_site import MultimodalPromptSite

from ._context import ContextAdapter, check_prompt_options

STD = 0.02
"""Standard deviation of initial prompts."""


class DeepPromptAdapter(ContextAdapter):
    """Class weights from prompts with learned vectors in the first blocks of the text tower, and tokens in the image tower.

    `context` (M, width) enters the first block at the positions after the start token; `deep` (J − 1, M, width), or None for
    J = 1, overwrites these positions before the blocks 1 … J − 1. The image tower has further tokens after the patches: the
    first ones pass the norm before the blocks, those of a later block replace the outputs of the former ones, and those of the
    last of the `depth` blocks stay until the end of the tower.
    """

    deep: nn.Parameter | None
    norm: nn.Module | None

    def __init__(self, site: MultimodalPromptSite, tokens: int, words: str, layers: int, image_tokens: int, depth: int) -> None:
        super().__init__(site, tokens, words, "end", by_class=False)
        self.tokens, self.image_tokens, self.depth, self.norm_path = tokens, image_tokens, depth, site.image_norm
        deep = torch.empty(layers - 1, tokens, site.width) if layers > 1 else None
        self.deep = None if deep is None else nn.Parameter(nn.init.normal_(deep, std=STD))

    def enter(self, tower: nn.Module) -> None:
        """Finds the text tower and the norm of the image tower, and initializes the context from words, if given."""
        super().enter(tower)
        self.__dict__["norm"] = tower.get_submodule(self.norm_path) if self.norm_path else None  # not a submodule

    def leave(self) -> None:
        """Drops the references to the towers."""
        super().leave()
        self.__dict__.pop("norm", None)

    @abstractmethod
    def image_prompt(self, index: int) -> Tensor:
        """Tokens (`image_tokens`, width of the image tower) before block `index`."""

    def weights(self, features: Tensor) -> Tensor:
        """The same for all images."""
        return self.encode(self.context.expand(len(self.ids), -1, -1), self.overwrite)

    def overwrite(self, index: int, x: Tensor) -> Tensor:
        """The input (n, length, width) of block `index` > 0 of the text tower, with its own prompts."""
        if self.deep is None or index > len(self.deep):
            return x
        prompt = self.deep[index - 1].to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], prompt, x[:, 1 + self.tokens :]], 1)

    def append(self, index: int, tokens: Tensor) -> Tensor:
        """The sequence (batch, length, width) with the prompts of a block of the image tower at its end."""
        prompt = self.image_prompt(index).to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        prompt = self.norm(prompt) if index == 0 and self.norm is not None else prompt
        return torch.cat([tokens, prompt], 1)

    def remove(self, index: int, tokens: Tensor) -> Tensor:
        """The sequence without the last tokens."""
        return tokens[:, : -self.image_tokens]


def check_deep_options(name: str, tokens: int, depth: int) -> None:
    """Raises `OptionError` for invalid options."""
    check_prompt_options(name, tokens, "end")
    if depth < 1:
        raise OptionError.of(name, "depth", depth, "at least 1")


def check_words(name: str, words: str, tokens: int, site: MultimodalPromptSite) -> None:
    """Raises `OptionError` if there are words, but fewer tokens than context vectors."""
    count = len(site.tokenizer.tokens(words))
    if words and count < tokens:
        message = f"{name}: words {words!r} have {count} tokens, but there are {tokens} context vectors"
        raise OptionError(message, option="words", method=name, given=count, expected=tokens)

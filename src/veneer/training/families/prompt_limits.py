"""Token limits of prompts: lengths by each tokenizer, prompts that are too long, and identities for the cache."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from veneer.injection.errors import OptionError

from ..data.captions import longest_prefix
from .errors import PromptError, PromptWarning

if TYPE_CHECKING:
    from torch import nn


class PromptLimits:
    """The part of `Family` that counts tokens.

    Attributes:
        pipe, truncate, max_tokens: see `Family`.
    """

    pipe: Any
    truncate: Literal["error", "warn"]
    max_tokens: int | None

    @property
    def text_towers(self) -> dict[str, nn.Module]:
        """Component name → text encoder, in the pipeline's order; empty for class-conditional models."""
        names = [name for name in self.pipe.components if name.startswith("text_encoder")]
        return {name: tower for name in sorted(names) if (tower := getattr(self.pipe, name)) is not None}

    def limits(self) -> Iterator[tuple[Any, int]]:
        """(tokenizer, token limit) of each text encoder."""
        for name in self.text_towers:
            tokenizer = getattr(self.pipe, name.replace("text_encoder", "tokenizer"))
            yield tokenizer, self.token_limit(tokenizer)

    def token_limit(self, tokenizer: Any) -> int:
        """Token limit of one text encoder: `text_tokens` for T5, else that of the tokenizer."""
        return self.text_tokens if "T5" in type(tokenizer).__name__ else int(tokenizer.model_max_length)

    @property
    def text_tokens(self) -> int:
        """Token limit of T5 or a language model: `max_tokens`, or the default of the pipeline's `encode_prompt`."""
        return self.max_tokens or int(inspect.signature(self.pipe.encode_prompt).parameters["max_sequence_length"].default)

    def fixed_tokens(self, tokens: int) -> int:
        """`tokens`, the only length of text that a model takes.

        Raises:
            OptionError: another `max_tokens`.
        """
        if self.max_tokens not in (None, tokens):
            message = (
                f"{type(self.pipe).__name__} takes text of {tokens} tokens only, got max_tokens={self.max_tokens}; leave it out."
            )
            raise OptionError(message, option="max_tokens", given=self.max_tokens, expected=tokens)
        return tokens

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        """The prompts as the pipeline passes them to a tokenizer, with multi-vector tokens expanded."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return list(convert(prompts, tokenizer)) if convert else prompts

    def shorten(self, prompt: str) -> str:
        """The longest prefix of whole words within the token limit of every text encoder.

        Raises:
            PromptError: the first word exceeds the limit.
        """
        short = prompt if not prompt.strip() else longest_prefix(prompt, self._fits)
        if prompt.strip() and not short:
            word = prompt.split()[0]
            raise PromptError(f"the first word of the prompt exceeds the token limit of the text encoder: {word!r}.", where=word)
        return short

    def _fits(self, prompt: str) -> bool:
        """Whether a prompt is within the token limit of every text encoder."""
        return all(len(self._token_ids([prompt], tokenizer)[0]) <= limit for tokenizer, limit in self.limits())

    def _token_ids(self, prompts: list[str], tokenizer: Any) -> list[list[int]]:
        return tokenizer(self.prepare(prompts, tokenizer), truncation=False, padding=False, verbose=False).input_ids

    def check_length(self, prompts: list[str]) -> None:
        """Raises or warns about prompts above the token limit, with the number of tokens and the part cut off."""
        for tokenizer, limit in self.limits():
            for prompt, row in zip(prompts, self._token_ids(prompts, tokenizer), strict=True):
                if len(row) <= limit:
                    continue
                lost = self.text_beyond(row, limit, tokenizer)
                data: dict[str, Any] = {"where": lost, "given": len(row), "expected": limit}
                message = f"the prompt {prompt!r} has {len(row)} tokens, above the text encoder's limit of {limit}: {lost!r}"
                if self.truncate == "error":
                    raise PromptError(f"{message} does not fit. Shorten it, or use truncate='warn' to cut that part off.", **data)
                warnings.warn(PromptWarning(f"{message} and is cut off", **data), stacklevel=3)

    def text_beyond(self, ids: list[int], limit: int, tokenizer: Any) -> str:
        """The part of a prompt beyond the token limit; an end token, the last of `ids` by CLIP and T5, is kept."""
        end = int(ids[-1] in tokenizer.all_special_ids)
        return str(tokenizer.decode(ids[limit - end : len(ids) - end]))

    def text_identity(self, prompt: str) -> str:
        """Cache identity of `encode_text` besides weights: pipeline class, token ids, token limit and padding."""
        parts: list[Any] = [type(self.pipe).__name__, self.truncate]
        for tokenizer, limit in self.limits():
            ids = self._token_ids([prompt], tokenizer)[0]
            parts.append([type(tokenizer).__name__, limit, tokenizer.pad_token_id, tokenizer.padding_side, list(ids)])
        return repr(parts)


class LanguageModelLimits(PromptLimits):
    """Limits of a language model as the text encoder: prompts are within a template, of which the first tokens are kept."""

    def token_limit(self, tokenizer: Any) -> int:
        return self.text_tokens

    def text_beyond(self, ids: list[int], limit: int, tokenizer: Any) -> str:
        """The part of a prompt beyond the token limit, without the end of the template."""
        return str(tokenizer.decode(ids[limit : len(ids) - self.template_end(ids, tokenizer)]))

    def template_end(self, ids: list[int], tokenizer: Any) -> int:
        """Number of tokens of the template after the prompt."""
        template = self._token_ids([""], tokenizer)[0]
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(ids), reversed(template), strict=False)))


class WholeTemplateLimits(LanguageModelLimits):
    """Limits of a language model whose pipeline cuts off nothing: words of the prompt are, and the template is whole."""

    def text_beyond(self, ids: list[int], limit: int, tokenizer: Any) -> str:
        end = self.template_end(ids, tokenizer)
        return str(tokenizer.decode(ids[limit - end : len(ids) - end]))

    def within_limits(self, prompts: list[str]) -> list[str]:
        """Prompts without the words above the token limit.

        Raises:
            PromptError: a prompt exceeds it and `truncate` is `error`, or its first word does.
        """
        self.check_length(prompts)
        return [prompt if self._fits(prompt) else self.shorten(prompt) for prompt in prompts]

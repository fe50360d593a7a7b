"""What methods with trained embeddings of new tokens share: the tokens, the initialization and the checks of options."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError, UnsupportedSite
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import VocabularySite

from ._tokenizer import add_tokens, check_new_token, remove_tokens, spellings


class NewTokenAdapter(Adapter):
    """Trained embeddings `vectors` of new tokens, (names, …, width), and their ids.

    `new_ids` are the ids of the new tokens, `known_ids` the ids that replace them in the model's input.
    """

    new_ids: Tensor
    known_ids: Tensor

    def __init__(self, site: VocabularySite, method: NewTokens, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.place, self.path, self.argument = site.name, site.path, site.argument
        self.tokenizer, self.method, self.entered = site.tokenizer, method, False
        count = len(method.names)
        self.vectors = nn.Parameter(torch.zeros(count, *shape, site.width))
        self.register_buffer("new_ids", torch.tensor(method.ids or [-1] * count), persistent=False)
        self.register_buffer("known_ids", torch.zeros(count, dtype=torch.long), persistent=False)

    def ids(self, ids: Tensor) -> Tensor:
        """Replaces new ids by known ones: that of the initializer token, else the first ordinary id."""
        hits = ids.unsqueeze(-1) == self.new_ids
        return torch.where(hits.any(-1), self.known_ids[hits.to(torch.uint8).argmax(-1)].to(ids.dtype), ids)

    def sample(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The host's sample with every new id inserted, between the first and the last position of its rows."""
        ids: Tensor = inputs[self.argument]
        count, inner = len(self.new_ids), ids.shape[1] - 2
        rows = ids[:1].repeat(max(len(ids), -(-count // inner)), 1)
        middle = rows[:, 1:-1].flatten().clone()
        middle[:count] = self.new_ids
        rows[:, 1:-1] = middle.view(-1, inner)
        return {**inputs, self.argument: rows}

    def enter(self, tower: nn.Module) -> None:
        """Adds the tokens to the tokenizer, and initializes the vectors from the host's table."""
        table: Any = tower.get_submodule(self.path)
        if self.tokenizer is not None:
            try:
                ids = add_tokens(self.tokenizer, self.method.names)
            except ValueError as error:
                message = f"{self.method.name}: {self.place}: {error}."
                raise UnsupportedSite.from_error(error, message, site=self.place, method=self.method.name) from error
            self.entered = True
            self.new_ids.copy_(torch.tensor(ids))
        if table.weight.device.type != "meta":
            with torch.no_grad():
                self._start(table.weight)

    def _start(self, table: Tensor) -> None:
        """Rows of the initializer words, if given, else N(0, standard deviation of the table)."""
        n, special = self.method.per_token, set(getattr(self.tokenizer, "all_special_ids", ()))
        self.known_ids.fill_(next(i for i in range(len(table)) if i not in special))
        if not all(self.method.words):
            self.vectors.copy_(torch.randn(self.vectors.shape) * table.std().float().cpu())
        for i, word in enumerate(self.method.words):
            if word:
                ids = self._known(word, len(table))
                ids = ids[:1] if self.method.subtokens == "first" else ids
                self.vectors[i * n : (i + 1) * n] = table[ids].float().mean(0)
                self.known_ids[i * n : (i + 1) * n] = ids[0]

    def _known(self, word: str, rows: int) -> list[int]:
        """Ids of an initializer word.

        Raises:
            UnsupportedSite: one of them has no row in the base's table, such as that of the new token itself.
        """
        ids: list[int] = self.tokenizer.encode(word, add_special_tokens=False)
        beyond = [self.tokenizer.convert_ids_to_tokens(i) for i in ids if i >= rows]
        if beyond or not ids:
            raise UnsupportedSite(
                f"{self.method.name}: {self.place}: initialize={word!r} has "
                + (f"the token {beyond[0]!r}, which is not among the {rows} rows of the base" if beyond else "no token")
                + f". Choose another initializer word, or a new token such as '<{'-'.join(word.split()) or 'concept'}>'.",
                site=self.place,
                method=self.method.name,
                option="initialize",
                given=beyond[0] if beyond else None,
                expected=rows,
            )
        return ids

    def leave(self) -> None:
        """Removes the tokens from the tokenizer."""
        if self.entered:
            remove_tokens(self.tokenizer, self.method.names)
            self.entered = False


class NewTokens(Method):
    """A method that trains embeddings of new tokens; a subclass has the options below as its fields."""

    needs: ClassVar[tuple[Need, ...]] = (Need(VocabularySite),)
    default: ClassVar[tuple[str, ...]] = ("*/vocabulary",)

    tokens: str | tuple[str, ...]
    initialize: str | tuple[str, ...]
    subtokens: str
    ids: tuple[int, ...]

    def check_options(self) -> None:
        """Raises `OptionError` for options that do not fit each other."""
        if not self.each or len(set(self.names)) != len(self.names):
            raise OptionError.of(self.name, "tokens", self.tokens, "one or more and differ")
        if not isinstance(self.initialize, str) and len(self.initialize) != len(self.each):
            count, expected = len(self.initialize), len(self.each)
            message = f"{self.name}: {expected} tokens, but {count} words in initialize"
            raise OptionError(message, option="initialize", method=self.name, given=count, expected=expected)
        if self.subtokens not in ("mean", "first"):
            raise OptionError.of(self.name, "subtokens", self.subtokens, "'mean' or 'first'")
        if self.ids and (len(set(self.ids)) != len(self.names) or min(self.ids) < 0):
            message = f"{self.name}: {len(self.names)} distinct ids are needed, got {self.ids}"
            raise OptionError(message, option="ids", method=self.name, given=self.ids, expected=len(self.names))

    @property
    def per_token(self) -> int:
        """Names of each token: `<toy>`, `<toy>_1`, …"""
        return 1

    @property
    def each(self) -> tuple[str, ...]:
        """The tokens as a tuple."""
        return (self.tokens,) if isinstance(self.tokens, str) else tuple(self.tokens)

    @property
    def names(self) -> list[str]:
        """All names of the tokens in the tokenizer: `<toy>`, `<toy>_1`, …"""
        return [name for token in self.each for name in spellings(token, self.per_token)]

    @property
    def words(self) -> tuple[str, ...]:
        """The initializer word of each token."""
        return (self.initialize,) * len(self.each) if isinstance(self.initialize, str) else tuple(self.initialize)

    def check_site(self, site: VocabularySite) -> None:
        """Checks the tokenizer of a site, or the ids without one.

        Raises:
            ValueError: the tokenizer already has a token, neither a tokenizer nor ids are available, or both are.
        """
        if site.tokenizer is None and (not self.ids or any(self.words)):
            message = "the model has no tokenizer: attach to the pipeline, or pass ids=(…) for the tokens and no initialize"
            raise OptionError(message, option="ids", method=self.name, given=self.ids, expected="tokenizer")
        if site.tokenizer is not None:
            if self.ids:
                raise OptionError("the tokenizer defines the ids; leave ids out", option="ids", method=self.name, given=self.ids)
            for token in self.each:
                check_new_token(site.tokenizer, token, self.per_token)

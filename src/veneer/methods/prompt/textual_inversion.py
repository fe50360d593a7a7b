"""Textual Inversion: new words, learned as rows of the text encoder's embedding table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.errors import OptionError, UnsupportedSite
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import VocabularySite

from ._tokenizer import claim, refuse_taken, release, spellings


class TextualInversionAdapter(Adapter):
    """rows[i] = vectors[k] where ids[i] is the k-th new id, else the host's row. `vectors`: (tokens·n, width).

    `new_ids` are the ids of the new tokens, `known_ids` those that stand in for them at the model's door.
    """

    new_ids: Tensor
    known_ids: Tensor

    def __init__(self, site: VocabularySite, method: TextualInversion) -> None:
        super().__init__()
        self.place, self.path, self.argument = site.name, site.path, site.argument
        self.tokenizer, self.method, self.entered = site.tokenizer, method, False
        count = len(method.names)
        self.vectors = nn.Parameter(torch.zeros(count, site.width))
        self.register_buffer("new_ids", torch.tensor(method.ids or [-1] * count), persistent=False)
        self.register_buffer("known_ids", torch.zeros(count, dtype=torch.long), persistent=False)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: ids (batch, length); y: rows (batch, length, width)."""
        hits = x.unsqueeze(-1) == self.new_ids
        learned = F.embedding(hits.to(torch.uint8).argmax(-1), self.vectors)
        return torch.where(hits.any(-1, keepdim=True), learned, y)

    def ids(self, ids: Tensor) -> Tensor:
        """New ids replaced by known ones: that of the word a vector began as, else the first ordinary one."""
        hits = ids.unsqueeze(-1) == self.new_ids
        return torch.where(hits.any(-1), self.known_ids[hits.to(torch.uint8).argmax(-1)].to(ids.dtype), ids)

    def sample(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The host's sample with every new id in it, between the first and the last place of its rows."""
        ids: Tensor = inputs[self.argument]
        count, inner = len(self.new_ids), ids.shape[1] - 2
        rows = ids[:1].repeat(max(len(ids), -(-count // inner)), 1)
        middle = rows[:, 1:-1].flatten().clone()
        middle[:count] = self.new_ids
        rows[:, 1:-1] = middle.view(-1, inner)
        return {**inputs, self.argument: rows}

    def enter(self, tower: nn.Module) -> None:
        """Add the tokens to the tokenizer, and start the vectors from the host's table."""
        table: Any = tower.get_submodule(self.path)
        if self.tokenizer is not None:
            try:
                ids = claim(self.tokenizer, self.method.names)
            except ValueError as error:
                message = f"textual_inversion: {self.place}: {error}."
                raise UnsupportedSite.from_error(error, message, site=self.place, method="textual_inversion") from error
            self.entered = True
            self.new_ids.copy_(torch.tensor(ids))
        if table.weight.device.type != "meta":
            with torch.no_grad():
                self._start(table.weight)

    def _start(self, table: Tensor) -> None:
        """Rows of words where there are words, N(0, std of the table) elsewhere."""
        n, special = self.method.vectors, set(getattr(self.tokenizer, "all_special_ids", ()))
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
            UnsupportedSite: one of them has no row in the base's table, as that of the new token itself.
        """
        ids: list[int] = self.tokenizer.encode(word, add_special_tokens=False)
        beyond = [self.tokenizer.convert_ids_to_tokens(i) for i in ids if i >= rows]
        if beyond or not ids:
            raise UnsupportedSite(
                f"textual_inversion: {self.place}: initialize={word!r} has "
                + (f"the token {beyond[0]!r}, which is not among the {rows} rows of the base" if beyond else "no token")
                + f". Choose another initializer word, or a new token such as '<{'-'.join(word.split()) or 'concept'}>'.",
                site=self.place,
                method="textual_inversion",
                option="initialize",
                given=beyond[0] if beyond else None,
                expected=rows,
            )
        return ids

    def leave(self) -> None:
        """Take the tokens out of the tokenizer."""
        if self.entered:
            release(self.tokenizer, self.method.names)
            self.entered = False


@dataclass(frozen=True)
class TextualInversion(Method):
    """v* = argmin_v E ‖ε − ε_θ(z_t, t, c(v))‖²: only the rows v of new tokens are trained, the table stays as it is.

    The tokens are added to the tokenizer of each text encoder while attached, `<toy>`, `<toy>_1`, … for several vectors, as
    diffusers' `maybe_convert_prompt` expands them. At strength s a token's row is (1 − s)·known + s·v, where `known` is the
    row of the word it began as: switched off, a prompt with the token is the prompt with that word.

    Args:
        tokens: a token or several; lower case where there are several vectors.
        vectors: n, rows per token.
        initialize: word or words that a token begins as, one text for all tokens or one per token; all n vectors begin alike.
            Empty: N(0, standard deviation of the table).
        subtokens: a word of several sub-tokens gives the `mean` of their rows, or the `first`.
        ids: ids of the vectors, in order, for a bare model that comes without a tokenizer.
    Counts: tokens·n·width per text encoder; SD 1.5 768, SDXL 768 + 1,280 for one vector.
    Source: Gal et al., An Image is Worth One Word, ICLR 2023, equation 2; several vectors: section 5. Deviation: learned rows
    beside the table in the place of rows in it, so that nothing of the table has to be restored after each step.
    """

    name: ClassVar[str] = "textual_inversion"
    paper: ClassVar[str] = "Gal et al., An Image is Worth One Word, ICLR 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(VocabularySite),)
    default: ClassVar[tuple[str, ...]] = ("*/vocabulary",)
    learning_rate: ClassVar[float] = 5e-3

    tokens: str | tuple[str, ...] = "<concept>"
    vectors: int = 1
    initialize: str | tuple[str, ...] = ""
    subtokens: Literal["mean", "first"] = "mean"
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise OptionError.of("textual_inversion", "vectors", self.vectors, "at least 1")
        if not self.each or len(set(self.names)) != len(self.names):
            raise OptionError.of("textual_inversion", "tokens", self.tokens, "one or more and differ")
        if not isinstance(self.initialize, str) and len(self.initialize) != len(self.each):
            given, expected = len(self.initialize), len(self.each)
            message = f"textual_inversion: {expected} tokens and {given} words in initialize"
            raise OptionError(message, option="initialize", method=self.name, given=given, expected=expected)
        if self.subtokens not in ("mean", "first"):
            raise OptionError.of("textual_inversion", "subtokens", self.subtokens, "'mean' or 'first'")
        if self.ids and (len(set(self.ids)) != len(self.names) or min(self.ids) < 0):
            message = f"textual_inversion: {len(self.names)} different ids are needed, got {self.ids}"
            raise OptionError(message, option="ids", method=self.name, given=self.ids, expected=len(self.names))

    @property
    def each(self) -> tuple[str, ...]:
        """The tokens, also where there is one."""
        return (self.tokens,) if isinstance(self.tokens, str) else tuple(self.tokens)

    @property
    def names(self) -> list[str]:
        """One name a vector: `<toy>`, `<toy>_1`, …"""
        return [name for token in self.each for name in spellings(token, self.vectors)]

    @property
    def words(self) -> tuple[str, ...]:
        """What each token begins as."""
        return (self.initialize,) * len(self.each) if isinstance(self.initialize, str) else tuple(self.initialize)

    @classmethod
    def examples(cls) -> tuple[TextualInversion, TextualInversion]:
        """For bare models, which come without a tokenizer: ids beyond any small table."""
        return cls(tokens=("<one>", "<two>"), ids=(90_000, 90_001)), cls(tokens="<three>", ids=(90_002,))

    def build(self, site: VocabularySite) -> TextualInversionAdapter:
        """Zero rows; they get their start values when attached.

        Raises:
            ValueError: the tokenizer has a token already, there is no tokenizer and no ids, or both.
        """
        if site.tokenizer is None and (not self.ids or any(self.words)):
            message = (
                "the model comes without a tokenizer: attach to the pipeline, or give ids=(…) for the tokens and no initialize"
            )
            raise OptionError(message, option="ids", method=self.name, given=self.ids, expected="tokenizer")
        if site.tokenizer is not None:
            if self.ids:
                raise OptionError("the tokenizer gives the ids; leave ids out", option="ids", method=self.name, given=self.ids)
            for token in self.each:
                refuse_taken(site.tokenizer, token, self.vectors)
        return TextualInversionAdapter(site, self)

    def count(self, site: VocabularySite) -> int:
        """tokens·n·width."""
        return len(self.names) * site.width

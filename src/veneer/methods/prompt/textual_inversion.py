"""Textual Inversion: new tokens, trained as rows of the text encoder's embedding table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.errors import OptionError, UnsupportedSite
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import VocabularySite

from ._tokenizer import add_tokens, check_new_token, remove_tokens, spellings


class TextualInversionAdapter(Adapter):
    """rows[i] = vectors[k] where ids[i] is the k-th new id, else the host's row. `vectors`: (tokens·n, width).

    `new_ids` are the ids of the new tokens, `known_ids` the ids that replace them in the model's input.
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
                message = f"textual_inversion: {self.place}: {error}."
                raise UnsupportedSite.from_error(error, message, site=self.place, method="textual_inversion") from error
            self.entered = True
            self.new_ids.copy_(torch.tensor(ids))
        if table.weight.device.type != "meta":
            with torch.no_grad():
                self._start(table.weight)

    def _start(self, table: Tensor) -> None:
        """Rows of the initializer words, if given, else N(0, standard deviation of the table)."""
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
            UnsupportedSite: one of them has no row in the base's table, such as that of the new token itself.
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
        """Removes the tokens from the tokenizer."""
        if self.entered:
            remove_tokens(self.tokenizer, self.method.names)
            self.entered = False


@dataclass(frozen=True)
class TextualInversion(Method):
    """v* = argmin_v E ‖ε − ε_θ(z_t, t, c(v))‖²: only the rows v of new tokens are trained, the table is frozen.

    While attached, the tokens are in the tokenizer of each text encoder: `<toy>`, `<toy>_1`, … for several vectors, as
    diffusers' `maybe_convert_prompt` expands them. At strength s a token's row is (1 − s)·known + s·v, where `known` is the
    row of its initializer token: when disabled, a prompt with the token equals the prompt with that word.

    Args:
        tokens: one or several tokens; lowercase if there are several vectors.
        vectors: n, rows per token.
        initialize: initializer word or words, one text for all tokens or one per token; all n vectors are initialized alike.
            Empty: N(0, standard deviation of the table).
        subtokens: for a word of several sub-tokens, use the `mean` of their rows, or the `first`.
        ids: ids of the vectors, in order, for a bare model without a tokenizer.
    Counts: tokens·n·width per text encoder; SD 1.5 768, SDXL 768 + 1,280 for one vector.
    Source: Gal et al., An Image is Worth One Word, ICLR 2023, equation 2; several vectors: section 5. Deviation: learned rows
    are stored beside the table, so that the table need not be restored after each step.
    """

    name: ClassVar[str] = "textual_inversion"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "smallest_file")
    recommended_for: ClassVar[tuple[str, ...]] = ("few_photos", "smallest_file")
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
            count, expected = len(self.initialize), len(self.each)
            message = f"textual_inversion: {expected} tokens, but {count} words in initialize"
            raise OptionError(message, option="initialize", method=self.name, given=count, expected=expected)
        if self.subtokens not in ("mean", "first"):
            raise OptionError.of("textual_inversion", "subtokens", self.subtokens, "'mean' or 'first'")
        if self.ids and (len(set(self.ids)) != len(self.names) or min(self.ids) < 0):
            message = f"textual_inversion: {len(self.names)} distinct ids are needed, got {self.ids}"
            raise OptionError(message, option="ids", method=self.name, given=self.ids, expected=len(self.names))

    @property
    def each(self) -> tuple[str, ...]:
        """The tokens as a tuple."""
        return (self.tokens,) if isinstance(self.tokens, str) else tuple(self.tokens)

    @property
    def names(self) -> list[str]:
        """One name per vector: `<toy>`, `<toy>_1`, …"""
        return [name for token in self.each for name in spellings(token, self.vectors)]

    @property
    def words(self) -> tuple[str, ...]:
        """The initializer word of each token."""
        return (self.initialize,) * len(self.each) if isinstance(self.initialize, str) else tuple(self.initialize)

    @classmethod
    def examples(cls) -> tuple[TextualInversion, TextualInversion]:
        """For bare models without a tokenizer: ids beyond any small table."""
        return cls(tokens=("<one>", "<two>"), ids=(90_000, 90_001)), cls(tokens="<three>", ids=(90_002,))

    def build(self, site: VocabularySite) -> TextualInversionAdapter:
        """Zero rows; they are initialized when attached.

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
                check_new_token(site.tokenizer, token, self.vectors)
        return TextualInversionAdapter(site, self)

    def count(self, site: VocabularySite) -> int:
        """tokens·n·width."""
        return len(self.names) * site.width

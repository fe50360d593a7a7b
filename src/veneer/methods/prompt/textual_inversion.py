"""Textual Inversion: new tokens, trained as rows of the text encoder's embedding table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.injection.errors import OptionError
from veneer.injection.sites import VocabularySite

from ._new_tokens import NewTokenAdapter, NewTokens


class TextualInversionAdapter(NewTokenAdapter):
    """rows[i] = vectors[k] where ids[i] is the k-th new id, else the host's row. `vectors`: (tokens·n, width)."""

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: ids (batch, length); y: rows (batch, length, width)."""
        hits = x.unsqueeze(-1) == self.new_ids
        learned = F.embedding(hits.to(torch.uint8).argmax(-1), self.vectors)
        return torch.where(hits.any(-1, keepdim=True), learned, y)


@dataclass(frozen=True)
class TextualInversion(NewTokens):
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
    Source: Gal et al., An Image is Worth One Word, ICLR 2023, equation 2; several vectors: section 5, and the authors' code.
    Deviations: without an initializer word, rows are uniform from 0 to 1 in the code. Compared with diffusers' script, learned
    rows are stored beside the table, so that the table need not be restored after each step.
    """

    name: ClassVar[str] = "textual_inversion"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "smallest_file")
    recommended_for: ClassVar[tuple[str, ...]] = ("few_photos", "smallest_file")
    paper: ClassVar[str] = "Gal et al., An Image is Worth One Word, ICLR 2023"
    learning_rate: ClassVar[float] = 5e-3

    tokens: str | tuple[str, ...] = "<concept>"
    vectors: int = 1
    initialize: str | tuple[str, ...] = ""
    subtokens: Literal["mean", "first"] = "mean"
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise OptionError.of(self.name, "vectors", self.vectors, "at least 1")
        self.check_options()

    @property
    def per_token(self) -> int:
        """n, names and vectors of each token."""
        return self.vectors

    @classmethod
    def examples(cls) -> tuple[TextualInversion, TextualInversion]:
        """For bare models without a tokenizer: ids beyond any small table."""
        return cls(tokens=("<one>", "<two>"), ids=(90_000, 90_001)), cls(tokens="<three>", ids=(90_002,))

    def build(self, site: VocabularySite) -> TextualInversionAdapter:
        """Zero rows; they are initialized when attached.

        Raises:
            ValueError: the tokenizer already has a token, neither a tokenizer nor ids are available, or both are.
        """
        self.check_site(site)
        return TextualInversionAdapter(site, self)

    def count(self, site: VocabularySite) -> int:
        """tokens·n·width."""
        return len(self.names) * site.width

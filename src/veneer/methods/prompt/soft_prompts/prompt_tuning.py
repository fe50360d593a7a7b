"""Prompt tuning: trained vectors before the input embeddings of a tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import PromptSite, TokenSite

from ._prompts import NEEDS, TextPrompts, TokenPrompts, check_tokens

Initial = Literal["auto", "uniform", "vocabulary", "classes"]


class PromptTokens(TokenPrompts):
    """`prompt`: (p, width), U(−limit, limit)."""

    def __init__(self, site: TokenSite, tokens: int, limit: float) -> None:
        super().__init__(site, tokens)
        self.prompt = nn.Parameter(torch.empty(tokens, site.width).uniform_(-limit, limit))

    def vectors(self) -> Tensor:
        """The parameter itself."""
        return self.prompt


@dataclass(frozen=True)
class PromptTuning(Method):
    """f([P; E(x)]): p trained vectors P beside the input embeddings E of a frozen tower; only the input layer has them.

    In the prompts of a CLIP classifier: [start] P_1 … P_p name . [end], with the same P for all classes, which is the equation of
    `coop`. On an image tower (`where="tokens.tower"`): after the class token, before the patches, removed before pooling and
    head, which is the equation of `vpt` with `where="tokens.tower"`. Only initial values, learning rate and options differ from
    theirs. In the text encoders of a diffusion pipeline, prompt tuning is `textual_inversion` with p vectors, whose token is in
    every prompt.

    Args:
        tokens: p, number of trained vectors, at least 1.
        initialize: `uniform` is U(−limit, limit); `vocabulary` samples the 5,000 most frequent token embeddings; `classes` is the
            mean of the token embeddings of each class name, then `vocabulary`; `auto` is `vocabulary` for prompts of classes, and
            `uniform` for images, which have no vocabulary.
        words: initial words of the first vectors, one for each, separated by white space, instead of class names; the others are
            as `initialize`.
        limit: bound of `uniform`, above 0.
    Counts: p·width; ViT-B/16 15,360 with p = 20, CLIP ViT-B/16 10,240.
    Source: Lester, Al-Rfou, Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021, sections 2 and 3.2,
    and the authors' code. Deviations: p = 20, where the authors use 100, more than CLIP's texts have room for; `classes` and
    `words` take the first p if there are more; the optimizer is that of the run, and the learning rate is ours.
    """

    name: ClassVar[str] = "prompt_tuning"
    uses: ClassVar[tuple[str, ...]] = ("few_labels", "smallest_file")
    paper: ClassVar[str] = "Lester, Al-Rfou, Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021"
    needs: ClassVar[tuple[Need, ...]] = NEEDS
    default: ClassVar[tuple[str, ...]] = ("prompts",)
    fallback: ClassVar[tuple[str, ...]] = ("tokens.tower",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2
    adapters: ClassVar[tuple[type[PromptTokens], type[TextPrompts]]] = (PromptTokens, TextPrompts)

    tokens: int = 20
    initialize: Initial = "auto"
    words: str = ""
    limit: float = 0.5

    def __post_init__(self) -> None:
        check_tokens(self.name, self.tokens)
        if self.initialize not in get_args(Initial):
            raise OptionError.of(self.name, "initialize", self.initialize, f"one of {', '.join(get_args(Initial))}")
        if self.limit <= 0:
            raise OptionError.of(self.name, "limit", self.limit, "above 0")

    @classmethod
    def examples(cls) -> tuple[PromptTuning, PromptTuning]:
        """For text towers with short prompts."""
        return cls(tokens=4), cls(tokens=2, initialize="uniform", limit=0.1)

    def build(self, site: TokenSite | PromptSite) -> PromptTokens | TextPrompts:
        """p vectors for one tower.

        Raises:
            OptionError: words or a vocabulary for an image tower. TextError: a prompt is too long for the text tower.
        """
        if isinstance(site, PromptSite):
            return self._build_text(site)
        for option in ("initialize", "words"):
            if getattr(self, option) not in ("", "auto", "uniform"):
                message = f"{option}={getattr(self, option)!r} needs a vocabulary, and images have none; use initialize='uniform'"
                raise OptionError(message, option=option, method=self.name, given=getattr(self, option), expected="uniform")
        return self.adapters[0](site, self.tokens, self.limit)

    def _build_text(self, site: PromptSite) -> TextPrompts:
        texts = self.words.split() or (site.classes if self.initialize == "classes" else ())
        adapter = self.adapters[1](site, self.tokens, "end", texts, self.initialize != "uniform")
        nn.init.uniform_(adapter.context, -self.limit, self.limit)
        return adapter

    def count(self, site: TokenSite | PromptSite) -> int:
        """p·width."""
        return self.tokens * site.width

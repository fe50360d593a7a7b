"""AutoPrompt: CLIP prompts of real tokens, one of which is exchanged at a time for the best of several candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed

from veneer.injection.errors import OptionError
from veneer.injection.sites import PromptSite, Site
from veneer.injection.training_protocol import Distance

from ._context import Position
from .pez import PEZ, PEZAdapter


class AutoPromptAdapter(PEZAdapter):
    """The context has the rows of the tokens after each step; its gradient selects the candidates.

    Attributes:
        choices: buffer (k,), ids of the candidates for `place`. `place`: buffer (), their position in the prompt, −1 for none.
        losses: buffer (k + 1,), summed losses of the present token and of the candidates in the current step.
        current: buffer (M,), ids of the tokens in the current step.
    """

    choices: Tensor
    place: Tensor
    losses: Tensor
    current: Tensor
    training_buffers = ("choices", "place")

    def __init__(self, site: PromptSite, tokens: int, words: str, position: Position, candidates: int) -> None:
        super().__init__(site, tokens, words, position)
        self.register_buffer("choices", torch.zeros(candidates, dtype=torch.int64), persistent=False)
        self.register_buffer("place", torch.full((), -1), persistent=False)
        self.register_buffer("losses", torch.zeros(candidates + 1), persistent=False)
        self.register_buffer("current", torch.zeros(tokens, dtype=torch.int64), persistent=False)
        self.number = 0

    def enter(self, tower: Any) -> None:
        """Finds the text tower, and initializes the context as `pez` does.

        Raises:
            OptionError: more candidates than tokens in the vocabulary.
        """
        super().enter(tower)
        count, limit = len(self.choices), len(self.texts.table) - len(self.special) - 1
        if count > limit:
            message = f"autoprompt: {count} candidates, but the vocabulary has {limit} other tokens"
            raise OptionError(message, option="candidates", method="autoprompt", given=count, expected=limit)

    def weights(self, features: Tensor) -> Tensor:
        """The same for all images; in a training pass of a candidate those of the prompt with it, without gradients."""
        if not self.number or not self.training or not torch.is_grad_enabled():
            return super().weights(features)
        with torch.no_grad():
            ids = self.nearest()[0]
            if self.place >= 0:
                ids[self.place] = self.choices[self.number - 1]
            return self.encode(self.texts.table[ids].to(self.context.dtype).expand(len(self.ids), -1, -1))

    @torch.no_grad()
    def exchange(self, step: int) -> None:
        """Uses the best candidate if it has a smaller loss than the token, else selects new candidates by the gradient."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.losses)
        ids, best = self.current, int(self.losses.nan_to_num(nan=torch.inf).argmin())  # NaN is the smallest for argmin
        gradient, table = self.context.grad, self.texts.table
        if self.place >= 0 and best > 0:
            ids[self.place] = self.choices[best - 1]
            self.place.fill_(-1)  # the gradient is that of the former token
        elif gradient is not None:
            place = position_of(step, len(ids))
            scores = -(table @ gradient[place].to(table.dtype))
            scores[[*self.special, int(ids[place])]] = -torch.inf
            self.choices.copy_(scores.topk(len(self.choices)).indices)
            self.place.fill_(place)
        self.context.copy_(table[ids])
        self.losses.zero_()


def position_of(step: int, tokens: int) -> int:
    """The position whose candidates are selected after a step: a hash of it, uniform in 0 … tokens − 1."""
    return int.from_bytes(hashlib.blake2b(str(step).encode(), digest_size=8).digest(), "big") % tokens


@dataclass(frozen=True)
class AutoPrompt(PEZ):
    """Candidates for token m: the k ids i with the largest −E_i·∂L/∂v_m. The one with the smallest L replaces it if L decreases.

    Prompts are those of `pez`: [start] v_1 … v_M name_k . [end] of real tokens, E the token-embedding table. A step has a forward
    pass with gradients and k passes of the text tower, one for each candidate of the last step, which are thus compared on
    another batch. After an exchange the next step has no candidates, because the gradient belongs to the former token.

    The learning rate has no effect: after each step the vectors are the rows of the tokens. In a training loop of your own:
    `attachment.begin_pass(seed, step, number)` before each of the 1 + k passes, `compare_passes` with their losses, `after_step`.

    Args:
        tokens: M, tokens of the prompt, at least 1.
        position: position of the name: after the tokens, in their middle (after M // 2) or before them.
        words: initial words, such as `a photo of a`; M is then their number of tokens. Empty: random tokens.
        candidates: k, tokens to try in each step, one forward pass for each, at least 1.
    Counts: M·width, as `pez`; the prompt itself is M integers.
    Source: Shin et al., AutoPrompt: Eliciting Knowledge from Language Models with Automatically Generated Prompts, EMNLP 2020,
    section 2.2, and the authors' code: one random position in a step, 10 candidates. Deviations: the paper's prompts are those of
    masked language models; the gradient is that of one optimizer step instead of 10 batches (use gradient accumulation); the
    position is a hash of the step; initial tokens are random instead of the mask token; losses decide, as in the paper, where
    the code compares accuracies if it has words of the classes; words with capital letters are candidates too.
    """

    name: ClassVar[str] = "autoprompt"
    uses: ClassVar[tuple[str, ...]] = ("few_labels",)
    paper: ClassVar[str] = (
        "Shin et al., AutoPrompt: Eliciting Knowledge from Language Models with Automatically Generated Prompts, EMNLP 2020"
    )

    candidates: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 1:
            raise OptionError.of(self.name, "candidates", self.candidates, "at least 1")

    @classmethod
    def examples(cls) -> tuple[AutoPrompt, AutoPrompt]:
        """For text towers with short prompts."""
        return cls(tokens=4, candidates=3), cls(words="a photo of", candidates=2)

    def build(self, site: PromptSite) -> AutoPromptAdapter:
        """M vectors.

        Raises:
            ValueError: a prompt is too long for the text tower.
        """
        return AutoPromptAdapter(site, self.length(site), self.words, self.position, self.candidates)

    @property
    def passes(self) -> int:
        """1 + k."""
        return 1 + self.candidates

    def begin_pass(self, adapters: Iterable[tuple[Site, Any]], seed: int, step: int, number: int) -> None:
        """The first pass has the tokens, each other one a candidate."""
        for _, adapter in adapters:
            if number == 0 and not adapter.context.is_meta:
                adapter.current.copy_(adapter.nearest()[0])
            adapter.number = number if number <= self.candidates else 0

    def consistency_loss(self, outputs: Sequence[Tensor], distance: Distance) -> Tensor:
        """Zeros (batch,): the passes are compared, not made similar."""
        return outputs[0].new_zeros(len(outputs[0]))

    def compare_passes(self, adapters: Iterable[tuple[Site, Any]], losses: Tensor) -> None:
        """Adds the losses of a micro-batch to those of the step."""
        for _, adapter in adapters:
            adapter.losses += losses.to(adapter.losses)
            adapter.number = 0

    def after_step(self, adapters: Iterable[tuple[Site, Any]], step: int, steps: int) -> None:
        """Exchanges a token, or selects candidates."""
        for _, adapter in adapters:
            adapter.exchange(step)

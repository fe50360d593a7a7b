"""PEZ for photos: a text whose CLIP features are similar to those of the photos, found by gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from veneer.base_models.clip_features import BaseClip
from veneer.functional.nearest_rows import nearest_rows, random_rows
from veneer.injection.errors import OptionError
from veneer.models.class_embeddings import ClassEmbeddings, text_tower
from veneer.models.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search.

    Args:
        tokens: M, number of tokens. `words`: initial text, whose number of tokens is then M; empty: random tokens.
        steps: optimizer steps. `learning_rate`, `weight_decay`: of AdamW. `batch`: photos per step, at random.
        seed: of the random tokens and photos.
    Raises:
        OptionError: a value out of range.
    """

    tokens: int = 16
    words: str = ""
    steps: int = 1000
    learning_rate: float = 0.1
    weight_decay: float = 0.1
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("steps", "batch"):
            if getattr(self, option) < 1:
                raise OptionError.of("pez", option, getattr(self, option), "at least 1")
        if not self.learning_rate > 0:
            raise OptionError.of("pez", "learning_rate", self.learning_rate, "above 0")
        if not self.weight_decay >= 0:
            raise OptionError.of("pez", "weight_decay", self.weight_decay, "at least 0")


@dataclass(frozen=True)
class PromptMatch:
    """A text, its mean cosine similarity to the photos in the CLIP, and the step in which it occurred, from 0."""

    text: str
    similarity: float
    step: int


class TokenPrompts:
    """Text features of prompts [start] v_1 … v_M [end] in a CLIP.

    Raises:
        OptionError: the CLIP's text tower does not accept embeddings, or its tokenizer has no texts of ids.
    """

    def __init__(self, clip: BaseClip, count: int, words: str) -> None:
        self.clip, self.tokenizer = clip, PromptTokenizer(clip.tokenizer, text_tower(clip.model).context_length)
        self.encoder = ClassEmbeddings(clip.model, ["X"], ["{}"], self.tokenizer)
        if not self.encoder.accepts_embeddings or not self.tokenizer.text(self.tokenizer.tokens("a")):
            message = "pez needs a CLIP with its own text tower and a tokenizer that decodes ids; choose another one by features"
            raise OptionError(message, option="features", given=type(clip.model).__name__)
        self.words = self.tokenizer.tokens(words)
        self.count = len(self.words) or count
        if not 1 <= self.count <= self.tokenizer.length - 2:
            limit = self.tokenizer.length - 2
            message = f"tokens is {self.count}; expected 1 to {limit}, which the CLIP accepts"
            raise OptionError(message, option="tokens", given=self.count, expected=limit)
        self.special = (self.tokenizer.start, self.tokenizer.end)
        self.table = self.encoder.table.detach()
        self.ids = self.tokenizer.row(self.tokenizer.tokens("X")[:1] * self.count)[None].to(self.table.device)

    def first(self, generator: torch.Generator) -> Tensor:
        """Ids (M,) of the words, or of random tokens."""
        if self.words:
            return torch.tensor(self.words, device=self.table.device)
        return random_rows(self.count, len(self.table), self.special, generator).to(self.table.device)

    def features(self, rows: Tensor) -> Tensor:
        """Normalized features (width,) of the prompt with these embeddings (M, width)."""
        embeddings = self.encoder.embed(self.ids)
        embeddings = torch.cat([embeddings[:, :1], rows[None].to(embeddings.dtype), embeddings[:, 1 + self.count :]], 1)
        return self.encoder.encode(self.ids, embeddings)[0]

    @torch.no_grad()
    def text(self, ids: Tensor) -> tuple[str, Tensor | None]:
        """The text of ids in one line, and its normalized features (width,), or None if it is empty or too long for the CLIP."""
        text = " ".join(self.tokenizer.text(ids.tolist()).split())  # some tokens of CLIP are line breaks
        if not 0 < len(self.tokenizer.tokens(text)) <= self.tokenizer.length - 2:
            return text, None
        return text, self.encoder.encode(self.tokenizer.ids([text]).to(self.table.device))[0]


def search_prompt(
    clip: BaseClip,
    images: Sequence[Image.Image],
    options: SearchOptions = SearchOptions(),
    on_step: Callable[[int, PromptMatch | None], Any] | None = None,
) -> PromptMatch:
    """Searches a text: v_m = E[argmax_i cos(p_m, E_i)], L = 1 − mean cos(text(v), image), ∂L/∂p_m := ∂L/∂v_m, by AdamW.

    Args:
        clip: an open_clip model with its tokenizer; its parameters are frozen. `images`: the photos.
        on_step: called with the number of finished steps and the best text so far.
    Returns:
        The text with the largest similarity to all photos, when it is split into tokens again as any prompt is.
    Raises:
        OptionError: a CLIP without embeddings as input, too many tokens, or no text was found.
    Source: Wen et al., Hard Prompts Made Easy, NeurIPS 2023, algorithm 1, and the authors' code. Deviations: the start and end
    token are left out; the best text is chosen by its own tokens, which may differ from those of the search; fewer steps.
    """
    clip.model.requires_grad_(False)
    prompts, generator = TokenPrompts(clip, options.tokens, options.words), torch.Generator().manual_seed(options.seed)
    with torch.no_grad():
        pixels = torch.stack([clip.preprocess(image) for image in images]).to(prompts.table.device)
        photos = normalize(clip.encode_image(pixels), dim=-1)
    context = nn.Parameter(prompts.table[prompts.first(generator)].float())
    optimizer = torch.optim.AdamW([context], lr=options.learning_rate, weight_decay=options.weight_decay)
    best: PromptMatch | None = None
    known: set[tuple[int, ...]] = set()
    for step in range(options.steps + 1):
        ids = nearest_rows(context, prompts.table, prompts.special)
        if tuple(ids.tolist()) not in known:
            known.add(tuple(ids.tolist()))
            best = _better(best, prompts, ids, photos, step)
        if step == options.steps:
            break
        batch = torch.randperm(len(photos), generator=generator)[: options.batch].to(photos.device)
        rows = prompts.table[ids].requires_grad_()
        loss = 1 - (photos[batch] @ prompts.features(rows)).mean()
        context.grad = torch.autograd.grad(loss, rows)[0].float()
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, best)
    if best is None:
        raise OptionError("pez found no text that the CLIP accepts; use fewer tokens", option="tokens", given=prompts.count)
    return best


def _better(best: PromptMatch | None, prompts: TokenPrompts, ids: Tensor, photos: Tensor, step: int) -> PromptMatch | None:
    """The better one of the best text and that of `ids`."""
    text, features = prompts.text(ids)
    similarity = -torch.inf if features is None else float((photos @ features).mean())
    return PromptMatch(text, similarity, step) if similarity > (best.similarity if best else -torch.inf) else best

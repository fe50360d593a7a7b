"""Captions of samples: templates, wildcards and caption augmentation."""

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..loop.seeds import generator
from .image_io import DataError

WILDCARD = re.compile(r"\{\{([^{}]*)\}\}|\{([^{}]*\|[^{}]*)\}")
"""`{a|b}`, or the literal `{{a|b}}`."""

OBJECT_TEMPLATES = (
    "a photo of {concept}",
    "a picture of {concept}",
    "a clear view of {concept}",
    "{concept} seen from nearby",
    "{concept} seen from afar",
    "a snapshot showing {concept}",
    "a close look at {concept}",
    "a detailed image of {concept}",
    "a bright photograph of {concept}",
    "a dim photograph of {concept}",
    "{concept} in the middle of the frame",
    "an ordinary image of {concept}",
    "here is {concept}",
    "{concept}, photographed",
)
STYLE_TEMPLATES = (
    "a picture in the style of {concept}",
    "a painting in the style of {concept}",
    "a drawing in the style of {concept}",
    "artwork by {concept}",
    "a small work in the manner of {concept}",
    "a large work in the manner of {concept}",
    "a detail of a work in the style of {concept}",
    "an image with the look of {concept}",
)


@dataclass(frozen=True)
class Captions:
    """Captions of samples. Pure: the same photo, seed, step and index give the same caption.

    Args:
        concept: replacement of `{concept}` in templates and captions, such as `"<toy>"`.
        prior: default caption of class images, such as `"a photo of a toy"`.
        templates: captions for photos without one; one is sampled per example.
        dropout: probability of the empty caption, which trains the unconditional branch of classifier-free guidance. Applied
            first.
        tag_dropout: probability of dropping each comma-separated tag after the first `keep_tokens`.
        shuffle: shuffle the tags after the first `keep_tokens`.
        keep_tokens: number of tags at the front that are never dropped or moved.
        prefix, suffix: text before and after every caption and template.
        keep_separator: text such as `|||` around the tags that may be dropped and shuffled, instead of `keep_tokens`: the tags
            before its first and after its second occurrence are kept. It is removed.
        secondary_separator: text such as `;;;` between tags that are dropped and shuffled as one; it becomes `, `.
    One option of `{a|b}` in a caption is chosen by seed, step and index; `{{a|b}}` stands for the text `{a|b}`.

    Raises:
        DataError: a probability outside 0 to 1, a negative `keep_tokens`, no template.
    """

    concept: str = ""
    prior: str = ""
    templates: Sequence[str] = ("a photo of {concept}",)
    dropout: float = 0.0
    tag_dropout: float = 0.0
    shuffle: bool = False
    keep_tokens: int = 0
    prefix: str = ""
    suffix: str = ""
    keep_separator: str = ""
    secondary_separator: str = ""

    def __post_init__(self) -> None:
        for name in ("dropout", "tag_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise self._wrong(name, "a probability from 0 to 1")
        if self.keep_tokens < 0:
            raise self._wrong("keep_tokens", "0 or more")
        if isinstance(self.templates, str) or not self.templates:
            raise self._wrong("templates", 'a tuple such as ("a photo of {concept}",)')

    def _wrong(self, name: str, expected: str) -> DataError:
        given = getattr(self, name)
        return DataError(f"captions: {name} is {given!r}; expected {expected}.", where=name, given=given, expected=expected)

    def lacks(self, written: str | None, is_prior: bool = False) -> bool:
        """Whether a photo would have no caption: it has no caption, and the concept (or the class prompt) is not set."""
        if written is not None:
            return "{concept}" in written and not self.concept
        return not self.prior if is_prior else not self.concept and any("{concept}" in each for each in self.templates)

    def sample(self, written: str | None, seed: int, step: int, index: int, is_prior: bool = False) -> str:
        """The caption of sample `index` at `step`; `written` is the photo's own caption or None."""
        draws = generator(seed, "caption", step, index)
        dropped, which = torch.rand(2, generator=draws, dtype=torch.float64).tolist()
        if dropped < self.dropout:
            return ""
        if written is None:
            written = self.prior if is_prior else self.templates[int(which * len(self.templates))]
        text = expand_wildcards(self.complete(written), generator(seed, "wildcard", step, index))
        return self._retagged(text, draws)

    def complete(self, written: str) -> str:
        """A caption or template with the prefix, the suffix and the concept."""
        return " ".join(filter(None, (self.prefix, written, self.suffix))).replace("{concept}", self.concept)

    def longest(self, written: str | None, is_prior: bool = False) -> list[str]:
        """The longest texts that `sample` returns for a photo: one per template, or one for its caption."""
        texts = [written] if written is not None else [self.prior] if is_prior else [*self.templates]
        return [self._separated(WILDCARD.sub(_longest_option, self.complete(text))) for text in texts]

    def varies(self, written: str | None) -> bool:
        """Whether the texts of a photo differ from step to step, besides the choice of the template."""
        texts = self.templates if written is None else (written,)
        return self.shuffle or self.tag_dropout > 0 or any(WILDCARD.search(self.complete(text)) for text in texts)

    def _retagged(self, text: str, draws: torch.Generator) -> str:
        if not (self.shuffle or self.tag_dropout):
            return self._separated(text)
        parts = text.split(self.keep_separator, 2) if self.keep_separator else [text]
        middle = _tags(parts[1] if len(parts) > 1 else parts[0])
        first, last = (_tags(parts[0]), _tags("".join(parts[2:]))) if len(parts) > 1 else (middle[: self.keep_tokens], [])
        loose = middle if len(parts) > 1 else middle[self.keep_tokens :]
        stay = (torch.rand(len(loose), generator=draws, dtype=torch.float64) >= self.tag_dropout).tolist()
        order = torch.randperm(len(loose), generator=draws).tolist() if self.shuffle else range(len(loose))
        return self._separated(", ".join([*first, *(loose[i] for i in order if stay[i]), *last]))

    def _separated(self, text: str) -> str:
        """The text with commas instead of the separators."""
        if self.keep_separator and self.keep_separator in text:
            text = ", ".join(tag for part in text.split(self.keep_separator) for tag in _tags(part))
        if self.secondary_separator:
            text = ", ".join(part.strip() for part in text.split(self.secondary_separator))
        return text


def expand_wildcards(text: str, draws: torch.Generator) -> str:
    """The text with one option of each `{a|b}`, of equal probability."""

    def choose(match: re.Match[str]) -> str:
        if match[2] is None:
            return f"{{{match[1]}}}"
        options = match[2].split("|")
        return options[int(torch.randint(len(options), (1,), generator=draws))]

    return WILDCARD.sub(choose, text)


def _longest_option(match: re.Match[str]) -> str:
    return f"{{{match[1]}}}" if match[2] is None else max(match[2].split("|"), key=len)


def _tags(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def mentions(concept: str, caption: str) -> bool:
    """Whether a caption contains `{concept}`, or the concept as whole words (case-insensitive)."""
    whole = rf"(?<!\w){re.escape(concept)}(?!\w)"
    return "{concept}" in caption or re.search(whole, caption, re.IGNORECASE) is not None


def rename_concept(text: str, concept: str, token: str) -> str:
    """The text with `token` instead of the concept as whole words (case-insensitive), except inside angle brackets."""
    return re.sub(rf"(?<![\w<]){re.escape(concept)}(?![\w>])", lambda _: token, text, flags=re.IGNORECASE)


def longest_prefix(text: str, fits: Callable[[str], bool]) -> str:
    """The longest prefix of whole words for which `fits` is true; empty if it is false for the first word.

    Args:
        fits: monotonic: true for every prefix of a text for which it is true.
    """
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    if not ends or fits(text):
        return text
    count = bisect.bisect_left(ends, True, key=lambda end: not fits(text[:end]))
    return text[: ends[count - 1]].rstrip(" ,;:") if count else ""

"""Captions from a `.txt` beside an image, from `metadata.jsonl` or from templates, and caption augmentation.

A caption file belongs to the image with the same stem. `metadata.jsonl` has one object a line: `file_name` and `text` (or
`caption`).
"""

import bisect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..loop.seeds import generator
from .image_io import DataError, DataWarning

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
        text = written.replace("{concept}", self.concept)
        return self._retagged(text, draws) if self.shuffle or self.tag_dropout else text

    def _retagged(self, text: str, draws: torch.Generator) -> str:
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        kept, loose = tags[: self.keep_tokens], tags[self.keep_tokens :]
        stay = (torch.rand(len(loose), generator=draws, dtype=torch.float64) >= self.tag_dropout).tolist()
        order = torch.randperm(len(loose), generator=draws).tolist() if self.shuffle else range(len(loose))
        return ", ".join(kept + [loose[i] for i in order if stay[i]])


def mentions(concept: str, caption: str) -> bool:
    """Whether a caption contains `{concept}`, or the concept as whole words (case-insensitive)."""
    whole = rf"(?<!\w){re.escape(concept)}(?!\w)"
    return "{concept}" in caption or re.search(whole, caption, re.IGNORECASE) is not None


def rename_concept(text: str, concept: str, token: str) -> str:
    """The text with `token` instead of the concept as whole words (case-insensitive), except inside angle brackets."""
    return re.sub(rf"(?<![\w<]){re.escape(concept)}(?![\w>])", lambda _: token, text, flags=re.IGNORECASE)


def read_captions(folder: Path, photos: Sequence[Path]) -> dict[Path, str]:
    """Captions of the `photos` in `folder`; a `.txt` beside an image overrides `metadata.jsonl`.

    Lines of a `.txt` are joined by spaces.

    Warns:
        DataWarning: an empty caption (treated as none), or two different captions of one photo.

    Raises:
        DataError: an invalid line, a caption of a missing file, two lines for one file, or text that is not UTF-8.
    """
    table = dict(_metadata(folder))
    captions = {}
    for photo in photos:
        beside = photo.with_suffix(".txt")
        text = table.get(photo.name)
        if beside.is_file():
            own = " ".join(_utf8(beside).split())
            if text is not None and text != own:
                message = f"{photo}: captions in {beside.name} and metadata.jsonl differ; {beside.name} is used"
                warnings.warn(DataWarning(message, file=photo, given=(own, text)), stacklevel=2)
            text = own
        if text:
            captions[photo] = text
        elif text is not None:
            message = f"{photo}: its caption is empty; a template is used instead"
            warnings.warn(DataWarning(message, file=photo, given=""), stacklevel=2)
    return captions


def _metadata(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / "metadata.jsonl"
    seen: dict[str, int] = {}
    for number, line in enumerate(_utf8(path).split("\n") if path.is_file() else (), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        name, text = _entry(line, path, where)
        if name in seen:
            message = f"{path}, {where}: {name!r} has a caption on line {seen[name]} already; expected one line per image."
            raise DataError(message, file=path, where=where, given=(name, f"line {seen[name]}"))
        target = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not target.is_file():
            message = f"{path}, {where}: file_name is {name!r}, which is not in {folder}. Correct it, or remove the line."
            raise DataError(message, file=path, where=where, given=name)
        seen[name] = number
        yield name, text


def _entry(line: str, path: Path, where: str) -> tuple[str, str]:
    example = '{"file_name": "01.jpg", "text": "a photo of <toy>"}'
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        message = f"{path}, {where}: not JSON ({error}); expected one object a line, such as {example}."
        raise DataError(message, file=path, where=where, expected="JSON") from error
    entry = entry if isinstance(entry, dict) else {}
    name, text = entry.get("file_name"), entry.get("text", entry.get("caption"))
    if not isinstance(name, str) or not isinstance(text, str) or not name:
        message = f"{path}, {where}: found {line.strip()[:80]}; expected file_name and text, such as {example}."
        raise DataError(message, file=path, where=where, given=entry, expected=("file_name", "text"))
    return name.removeprefix("./"), " ".join(text.split())


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8."
        raise DataError(message, file=path, where=f"byte {error.start}", expected="UTF-8") from error
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}). Check permissions."
        raise DataError(message, file=path, given="unreadable") from error


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

"""Pictures for the pages: bases stay loaded, and adapters stay attached and are switched."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from veneer import activate, attachments, base_models
from veneer.base_models.devices import resolve_device
from veneer.formats import load_all
from veneer.injection import Attachment, ConditionError, VeneerError
from veneer.training import param_groups
from veneer.training.families import family
from veneer.training.report.previews import Preview, PreviewSettings, previews

from .limits import LIMITS

KEPT = 2
"""Bases that stay loaded."""
Given = Callable[[Any, Attachment], Mapping[str, Any]]
"""What an adapter that follows something is given, by the pipeline and the adapter."""


@dataclass(frozen=True)
class Use:
    """An adapter in a picture.

    Args:
        file: of the adapter. `strength`: 0 the base, 1 as trained.
        given: for one that follows something. `start`, `end`: part of the schedule in which it acts.
    """

    file: Path
    strength: float = 1.0
    given: Given | None = None
    start: float = 0.0
    end: float = 1.0


class _Key(NamedTuple):
    """A file as it is now."""

    file: str
    size: int
    inode: int
    changed: int


@dataclass
class _Base:
    """A loaded base, and what is attached to it by file, the last used at the end."""

    pipe: Any
    attached: OrderedDict[_Key, list[Attachment]] = field(default_factory=OrderedDict)


class Painter:
    """Draws one request after the other.

    All that it keeps is bounded: `KEPT` bases, and on each `LIMITS.adapters` files of `LIMITS.file_bytes` together.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = resolve_device(device)
        self._bases: OrderedDict[str, _Base] = OrderedDict()
        self._one = threading.Lock()

    def draw(
        self,
        base: str,
        prompts: Sequence[str],
        settings: PreviewSettings,
        uses: Sequence[Use] = (),
        words: Mapping[str, str] | None = None,
    ) -> list[Preview]:
        """Pictures of every prompt and seed with these adapters, in their order; those of other requests do not act.

        What is used at strength 0 is left out: it is the base, also where a file brings words or weights of the base.

        Args:
            words: replacements in the prompts, for words that the base does not know; the noise stays that of the prompt.
        Raises:
            VeneerError: a base or an adapter that cannot be loaded or does not fit, or a prompt that is too long: see `shorten`.
        """
        with self._one:
            kept = self._base(base)
            with self._using(kept, [use for use in uses if use.strength]):
                if not words:  # else it was counted with the tokens of adapters that are not attached now
                    family(kept.pipe).check_length(list(prompts))
                return previews(kept.pipe, prompts, settings, words)

    def shorten(self, base: str, prompt: str, uses: Sequence[Use] = ()) -> str:
        """As much of a prompt, from its start, as the text encoders take, with the tokens of these adapters.

        Raises:
            VeneerError: a base or an adapter that cannot be loaded or does not fit.
        """
        with self._one:
            kept = self._base(base)
            with self._using(kept, [use for use in uses if use.strength and use.given is None]):
                return family(kept.pipe).shorten(prompt)

    def side(self, base: str) -> tuple[int, int]:
        """The side in pixels that a base was trained for, and what sides must be a multiple of.

        Raises:
            VeneerError: a base that cannot be loaded.
        """
        with self._one:
            kind = family(self._base(base).pipe)
            return kind.resolution, kind.multiple

    def _base(self, name: str) -> _Base:
        if name not in self._bases:
            while len(self._bases) >= KEPT:
                self._bases.popitem(last=False)
                gc.collect()  # adapters and the layers that they sit on refer to one another
            pipe = base_models.load(name).to(self.device)
            param_groups.freeze(pipe)
            self._bases[name] = _Base(pipe)
        self._bases.move_to_end(name)
        return self._bases[name]

    @contextlib.contextmanager
    def _using(self, kept: _Base, uses: Sequence[Use]) -> Iterator[None]:
        """Only these act; words and weights of the base that an adapter brings are gone afterwards."""
        try:
            found = _in_order(kept, uses)
            strengths = {a.name: use.strength for use, attached in found for a in attached}
            with contextlib.ExitStack() as scopes:
                scopes.enter_context(activate(kept.pipe, strengths))
                for use, attached in found:
                    for a in attached:
                        if a.method.conditions:
                            scopes.enter_context(_given(kept.pipe, use, a))
                yield
        finally:
            _let_go(kept)


def _in_order(kept: _Base, uses: Sequence[Use]) -> list[tuple[Use, list[Attachment]]]:
    """What is used, attached in the order of the request: some changes of weights are no sums, and depend on it."""
    found = [(use, _attached(kept, use.file)) for use in uses]
    wanted = [a for _, attached in found for a in attached]
    if wanted != [a for a in attachments(kept.pipe) if a in wanted]:
        for use in uses:
            _detach(kept, _key(use.file))
        found = [(use, _attached(kept, use.file)) for use in uses]
    return found


def _attached(kept: _Base, file: Path) -> list[Attachment]:
    """A file's attachments; those of its earlier content are taken off."""
    key = _key(file)
    if key not in kept.attached:
        for old in [each for each in kept.attached if each.file == key.file]:
            _detach(kept, old)
        kept.attached[key] = load_all(kept.pipe, file)
    kept.attached.move_to_end(key)
    return kept.attached[key]


def _let_go(kept: _Base) -> None:
    """Detach what cannot sleep, and the files that were used longest ago."""
    for key, attached in list(kept.attached.items()):
        many = len(kept.attached) > LIMITS.adapters or sum(each.size for each in kept.attached) > LIMITS.file_bytes
        if many or any(a.extras or param_groups.learns_words(a.method) for a in attached):
            _detach(kept, key)


def _detach(kept: _Base, key: _Key) -> None:
    for attachment in reversed(kept.attached.pop(key, [])):
        attachment.detach()


def _key(file: Path) -> _Key:
    try:
        found = file.stat()
    except OSError as error:
        message = f"the file of adapter {file.stem!r} is gone. Choose another of the list."
        raise VeneerError(message, where=file.stem, given="missing") from error
    return _Key(str(file), found.st_size, found.st_ino, found.st_mtime_ns)


def _given(pipe: Any, use: Use, attachment: Attachment) -> contextlib.AbstractContextManager[None]:
    if use.given is None:
        message = f"{attachment.name!r} ({attachment.method.name}) follows a picture; draw with it on the page Control."
        raise ConditionError(message, where=attachment.name)
    return attachment.condition(**use.given(pipe, attachment), start=use.start, end=use.end, pipeline=pipe)

"""Pictures for the pages: bases stay loaded, and adapters stay attached and are switched."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer import activate, bases
from veneer.formats import load_all
from veneer.injection import Attachment
from veneer.training import targets
from veneer.training.families import family
from veneer.training.previews import Preview, PreviewSettings, previews

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


@dataclass
class _Base:
    """A loaded base, and what is attached to it by file, the last used at the end."""

    pipe: Any
    attached: OrderedDict[tuple[str, int], list[Attachment]] = field(default_factory=OrderedDict)


class Painter:
    """Draws one request after the other. Everything that it keeps is bounded: `KEPT` bases, `LIMITS.adapters` files on each."""

    def __init__(self, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._bases: OrderedDict[str, _Base] = OrderedDict()
        self._one = threading.Lock()

    def draw(self, base: str, prompts: Sequence[str], settings: PreviewSettings, uses: Sequence[Use] = ()) -> list[Preview]:
        """Pictures of every prompt and seed with these adapters; those of other requests do not act.

        Raises:
            VeneerError: a base or an adapter that cannot be loaded or does not fit, or a prompt that is too long.
        """
        with self._one:
            kept = self._base(base)
            family(kept.pipe).check_length(list(prompts))
            with self._using(kept, uses):
                return previews(kept.pipe, prompts, settings)

    def _base(self, name: str) -> _Base:
        if name not in self._bases:
            pipe = bases.load(name).to(self.device)
            targets.freeze(pipe)
            self._bases[name] = _Base(pipe)
        self._bases.move_to_end(name)
        while len(self._bases) > KEPT:
            self._bases.popitem(last=False)
        return self._bases[name]

    @contextlib.contextmanager
    def _using(self, kept: _Base, uses: Sequence[Use]) -> Iterator[None]:
        """Only these act; words and weights of the base that an adapter brings are gone afterwards."""
        try:
            found = [(use, self._attached(kept, use.file)) for use in uses]
            strengths = {a.name: use.strength for use, attached in found for a in attached}
            with contextlib.ExitStack() as scopes:
                scopes.enter_context(activate(kept.pipe, strengths))
                for use, attached in found:
                    for a in attached:
                        if use.given is not None and a.method.conditions:
                            given = use.given(kept.pipe, a)
                            scopes.enter_context(a.given(**given, start=use.start, end=use.end, pipeline=kept.pipe))
                yield
        finally:
            self._let_go(kept)

    def _attached(self, kept: _Base, file: Path) -> list[Attachment]:
        key = (str(file), file.stat().st_mtime_ns)
        if key not in kept.attached:
            kept.attached[key] = load_all(kept.pipe, file)
        kept.attached.move_to_end(key)
        return kept.attached[key]

    @staticmethod
    def _let_go(kept: _Base) -> None:
        """Detach what cannot sleep, and the files that were used longest ago."""
        for key, attached in list(kept.attached.items()):
            if len(kept.attached) > LIMITS.adapters or any(a.extras or targets.learns_words(a.method) for a in attached):
                for attachment in reversed(attached):
                    attachment.detach()
                del kept.attached[key]

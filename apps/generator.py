"""Image generation for the pages: base models stay loaded; adapters stay attached and are activated per request."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from veneer import activate, attachments
from veneer.base_models.devices import resolve_device
from veneer.base_models.loading import load_on_device
from veneer.formats import load_all
from veneer.injection import Attachment, ConditionError, VeneerError
from veneer.training import attach_methods, prepare_base
from veneer.training.families import family
from veneer.training.report.previews import Preview, PreviewSettings, previews

from .limits import LIMITS

MAX_BASES = 2
"""Base models that stay loaded."""
Conditioning = Callable[[Any, Attachment], Mapping[str, Any]]
"""Computes the conditioning of a control adapter from the pipeline and the attachment."""


@dataclass(frozen=True)
class AdapterUse:
    """An adapter file to generate with.

    Args:
        file: of the adapter. `strength`: 0 disables it, 1 is as trained.
        conditioning: for control adapters. `start`, `end`: fraction of the sampling steps in which it is active.
    """

    file: Path
    strength: float = 1.0
    conditioning: Conditioning | None = None
    start: float = 0.0
    end: float = 1.0


class _FileKey(NamedTuple):
    """Identifies one version of a file."""

    file: str
    size: int
    inode: int
    modified: int


@dataclass
class _LoadedBase:
    """A loaded base model and its attachments by file, in least-recently-used order."""

    pipe: Any
    attached: OrderedDict[_FileKey, list[Attachment]] = field(default_factory=OrderedDict)


class Generator:
    """Generates images for one request at a time.

    Memory is bounded: at most `MAX_BASES` base models, each with at most `LIMITS.adapters` adapter files of
    `LIMITS.file_bytes` in total.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = resolve_device(device)
        self._bases: OrderedDict[str, _LoadedBase] = OrderedDict()
        self._lock = threading.Lock()

    def generate(
        self,
        base: str,
        prompts: Sequence[str],
        settings: PreviewSettings,
        uses: Sequence[AdapterUse] = (),
        words: Mapping[str, str] | None = None,
    ) -> list[Preview]:
        """Generates one image for each prompt and seed with these adapters active, applied in the given order.

        Adapters of strength 0 are not attached, so their token embeddings and base weights have no effect either.

        Args:
            words: replacements in the prompts for tokens that the base model does not know; the initial noise is unchanged.
        Raises:
            VeneerError: a base model or adapter cannot be loaded or is incompatible, or a prompt is too long (see `shorten`).
        """
        with self._lock:
            base_model = self._base(base)
            with self._activate(base_model, [use for use in uses if use.strength]):
                if not words:  # replaced tokens belong to adapters that are not attached here
                    family(base_model.pipe).check_length(list(prompts))
                return previews(base_model.pipe, prompts, settings, words)

    def shorten(self, base: str, prompt: str, uses: Sequence[AdapterUse] = ()) -> str:
        """Truncates a prompt to the length that the text encoders accept, counting the tokens of these adapters.

        Raises:
            VeneerError: a base model or adapter cannot be loaded or is incompatible.
        """
        with self._lock:
            base_model = self._base(base)
            with self._activate(base_model, [use for use in uses if use.strength and use.conditioning is None]):
                return family(base_model.pipe).shorten(prompt)

    def resolution(self, base: str) -> tuple[int, int]:
        """Native resolution of a base model in pixels, and the multiple that image sides must be divisible by.

        Raises:
            VeneerError: the base model cannot be loaded.
        """
        with self._lock:
            kind = family(self._base(base).pipe)
            return kind.resolution, kind.multiple

    def _base(self, name: str) -> _LoadedBase:
        if name not in self._bases:
            while len(self._bases) >= MAX_BASES:
                self._bases.popitem(last=False)
                gc.collect()  # adapters and their host layers form reference cycles
            pipe = load_on_device(name, self.device)
            prepare_base.freeze(pipe)
            self._bases[name] = _LoadedBase(pipe)
        self._bases.move_to_end(name)
        return self._bases[name]

    @contextlib.contextmanager
    def _activate(self, base_model: _LoadedBase, uses: Sequence[AdapterUse]) -> Iterator[None]:
        """Activates only these adapters; token embeddings and base weights that a file replaces are restored afterwards."""
        try:
            attached_uses = _attach_in_order(base_model, uses)
            strengths = {a.name: use.strength for use, attached in attached_uses for a in attached}
            with contextlib.ExitStack() as scopes:
                scopes.enter_context(activate(base_model.pipe, strengths))
                for use, attached in attached_uses:
                    for a in attached:
                        if a.method.conditions:
                            scopes.enter_context(_condition(base_model.pipe, use, a))
                yield
        finally:
            _evict(base_model)


def _attach_in_order(base_model: _LoadedBase, uses: Sequence[AdapterUse]) -> list[tuple[AdapterUse, list[Attachment]]]:
    """Attaches the adapters in the order of the request, which matters for weight updates that are not additive."""
    attached_uses = [(use, _attachments_of(base_model, use.file)) for use in uses]
    requested = [a for _, attached in attached_uses for a in attached]
    if requested != [a for a in attachments(base_model.pipe) if a in requested]:
        for use in uses:
            _detach(base_model, _key(use.file))
        attached_uses = [(use, _attachments_of(base_model, use.file)) for use in uses]
    return attached_uses


def _attachments_of(base_model: _LoadedBase, file: Path) -> list[Attachment]:
    """Attachments of a file; those of an earlier version of the file are detached."""
    key = _key(file)
    if key not in base_model.attached:
        for old in [each for each in base_model.attached if each.file == key.file]:
            _detach(base_model, old)
        base_model.attached[key] = load_all(base_model.pipe, file)
    base_model.attached.move_to_end(key)
    return base_model.attached[key]


def _evict(base_model: _LoadedBase) -> None:
    """Detaches what cannot be disabled, and the least recently used files beyond the limits."""
    for key, attached in list(base_model.attached.items()):
        over_limit = (
            len(base_model.attached) > LIMITS.adapters or sum(each.size for each in base_model.attached) > LIMITS.file_bytes
        )
        if over_limit or any(a.extras or attach_methods.trains_token_embeddings(a.method) for a in attached):
            _detach(base_model, key)


def _detach(base_model: _LoadedBase, key: _FileKey) -> None:
    for attachment in reversed(base_model.attached.pop(key, [])):
        attachment.detach()


def _key(file: Path) -> _FileKey:
    try:
        status = file.stat()
    except OSError as error:
        message = f"the file of adapter {file.stem!r} no longer exists. Choose another adapter from the list."
        raise VeneerError(message, where=file.stem, given="missing") from error
    return _FileKey(str(file), status.st_size, status.st_ino, status.st_mtime_ns)


def _condition(pipe: Any, use: AdapterUse, attachment: Attachment) -> contextlib.AbstractContextManager[None]:
    if use.conditioning is None:
        message = f"{attachment.name!r} ({attachment.method.name}) needs a conditioning image; use it on the page Control."
        raise ConditionError(message, where=attachment.name)
    return attachment.condition(**use.conditioning(pipe, attachment), start=use.start, end=use.end, pipeline=pipe)

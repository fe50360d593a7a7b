"""Seams of sequences: inserted or left out tokens, and trained rows of a token-embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapter_forms import TokenAdapter, VocabularyAdapter
from ..errors import StateError
from ..method import Adapter
from ..sites import Port, StreamSite, TokenSite, VocabularySite
from .adapter_calls import blend, cast, first_argument, main_output
from .seam import HookSeam


class UnblendedSeam(HookSeam):
    """Base of seams whose strength must be 0 or 1. It is a Python value, so a change of it recompiles a compiled graph.

    Attributes:
        active: True at strength 1.
    """

    active = True

    def check_strength(self, strength: float) -> None:
        """Raises `StateError` for a strength that is neither 0 nor 1."""
        if strength not in (0, 1):
            site = self.sites[0].name
            message = f"{site}: tokens cannot be blended, so the strength must be 0 or 1, got {strength}."
            raise StateError(message, where=site, given=strength, expected=(0, 1))

    def write_strength(self, strength: float) -> None:
        """Enables (1) or disables (0) the change of the sequence."""
        super().write_strength(strength)
        self.active = bool(strength)


class TokenSeam(UnblendedSeam):
    """Changes the sequence at the start of a site's extent, such as by inserting tokens, and undoes it at its end.

    Of several such seams that end at one module, the last one is undone first.
    """

    adapters: Sequence[TokenAdapter]

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[TokenSite | StreamSite, Adapter]]) -> None:
        super().__init__(tower, parts)
        site = parts[0][0]
        if isinstance(site, StreamSite):
            self.enter, self.leave = Port(site.path, "in"), Port(site.path, "out")
        else:
            self.enter, self.leave = site.enter, site.leave
        self.home = self.enter.path

    def hooks(self) -> list[RemovableHandle]:
        enter, leave = self.module(self.enter.path), self.module(self.leave.path)
        is_nested = any(isinstance(getattr(hook, "__self__", None), TokenSeam) for hook in leave._forward_hooks.values())
        return [
            enter.register_forward_pre_hook(self._enter, with_kwargs=True),
            leave.register_forward_hook(self._leave, prepend=is_nested),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        tokens = first_argument(args, kwargs)
        after = self.adapters[0].insert(tokens).to(tokens.dtype)
        if args:
            return (after, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): after}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.active:
            return None
        after = self.adapters[0].remove(main_output(output))
        return (after, *output[1:]) if isinstance(output, tuple) else after


class VocabularySeam(HookSeam):
    """Trained embeddings of new token ids.

    A pre-hook on the root module replaces new ids by ids of the base vocabulary (`ids(ids)`), so that the host's own use of ids
    still works. A hook on the embedding table then inserts the trained embeddings (`output(ids, rows)`).
    """

    adapters: Sequence[VocabularyAdapter]

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[VocabularySite, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.home = self.sites[0].path
        self._ids: Tensor | None = None

    def hooks(self) -> list[RemovableHandle]:
        site: VocabularySite = self.sites[0]
        root, table = self.module(site.ids.path), self.module(site.path)
        return [
            root.register_forward_pre_hook(self._replace_ids, with_kwargs=True),
            table.register_forward_hook(self._write_embeddings),
        ]

    def _replace_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site: VocabularySite = self.sites[0]
        by_name = site.argument in kwargs
        ids = kwargs[site.argument] if by_name else (args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            return None
        self._ids = ids
        base_ids = self.adapters[0].ids(ids)
        return (args, {**kwargs, site.argument: base_ids}) if by_name else ((base_ids, *args[1:]), kwargs)

    def _write_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        ids, self._ids = self._ids, None
        if ids is None or self.is_bypassed():
            return None
        adapter = self.adapters[0]
        rows = cast(output, adapter)
        return blend(adapter, adapter.output, rows, ids.reshape(output.shape[:-1])).to(output.dtype)

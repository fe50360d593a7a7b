"""Seams of sequences: inserted tokens, and trained rows of a token-embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapter_forms import TokenAdapter, VocabularyAdapter
from ..errors import StateError
from ..method import Adapter
from ..sites import TokenSite, VocabularySite
from .adapter_calls import blend, cast, first_argument, main_output
from .seam import HookSeam


class TokenSeam(HookSeam):
    """Inserts tokens at the start of a site's extent, and removes them at its end.

    The strength must be 0 or 1. It is a Python value, so a change of it recompiles a compiled graph.
    """

    adapters: Sequence[TokenAdapter]

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[TokenSite, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.home = self.sites[0].enter.path
        self.active = True

    def hooks(self) -> list[RemovableHandle]:
        site: TokenSite = self.sites[0]
        enter, leave = self.module(site.enter.path), self.module(site.leave.path)
        return [enter.register_forward_pre_hook(self._enter, with_kwargs=True), leave.register_forward_hook(self._leave)]

    def check_strength(self, strength: float) -> None:
        """Raises `StateError` for a strength that is neither 0 nor 1."""
        if strength not in (0, 1):
            site = self.sites[0].name
            message = f"{site}: tokens cannot be blended, so the strength must be 0 or 1, got {strength}."
            raise StateError(message, where=site, given=strength, expected=(0, 1))

    def write_strength(self, strength: float) -> None:
        """Enables (1) or disables (0) the insertion of tokens."""
        super().write_strength(strength)
        self.active = bool(strength)

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

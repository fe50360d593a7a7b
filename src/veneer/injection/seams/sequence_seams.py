"""Call seams that act on sequences: tokens inserted into a stream, and learned rows of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import StateError
from ..method import Adapter
from ..sites import TokenSite, VocabularySite
from .adapter_calls import blend, cast, first, main_output
from .call_seam import HookSeam


class TokenSeam(HookSeam):
    """Inserts tokens where a site's extent begins and takes them out where it ends.

    The adapter offers `insert(tokens) -> tokens` and `remove(tokens) -> tokens`. A sequence has no half-inserted tokens, so
    the strength must be 0 or 1; switching between them is a guard of a compiled graph, not a buffer.
    """

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[TokenSite, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.home = self.sites[0].enter.path
        self.active = True

    def hooks(self) -> list[RemovableHandle]:
        site: TokenSite = self.sites[0]
        enter, leave = self.module(site.enter.path), self.module(site.leave.path)
        return [enter.register_forward_pre_hook(self._enter, with_kwargs=True), leave.register_forward_hook(self._leave)]

    def check_strength(self, strength: float) -> None:
        """Raise `StateError` for a strength that is neither 0 nor 1."""
        if strength not in (0, 1):
            site = self.sites[0].name
            message = f"{site}: inserted tokens are there or not; strength must be 0 or 1, got {strength}."
            raise StateError(message, where=site, given=strength, expected=(0, 1))

    def write_strength(self, strength: float) -> None:
        """Switch the tokens on (1) or off (0)."""
        super().write_strength(strength)
        self.active = bool(strength)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        adapter: Any = self.adapters[0]
        tokens = first(args, kwargs)
        after = adapter.insert(tokens).to(tokens.dtype)
        if args:
            return (after, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): after}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.active:
            return None
        adapter: Any = self.adapters[0]
        after = adapter.remove(main_output(output))
        return (after, *output[1:]) if isinstance(output, tuple) else after


class VocabularySeam(HookSeam):
    """Learned rows for new token ids.

    At the model's door the adapter's `ids(ids)` gives ids that the host knows (so that its own logic on ids stays right);
    at the table `output(ids, rows)` puts the learned rows in.
    """

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[VocabularySite, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.home = self.sites[0].path
        self._ids: Tensor | None = None

    def hooks(self) -> list[RemovableHandle]:
        site: VocabularySite = self.sites[0]
        door, table = self.module(site.ids.path), self.module(site.path)
        return [door.register_forward_pre_hook(self._door, with_kwargs=True), table.register_forward_hook(self._table)]

    def _door(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site: VocabularySite = self.sites[0]
        adapter: Any = self.adapters[0]
        named = site.argument in kwargs
        ids = kwargs[site.argument] if named else (args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            return None
        self._ids = ids
        known = adapter.ids(ids)
        return (args, {**kwargs, site.argument: known}) if named else ((known, *args[1:]), kwargs)

    def _table(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        ids, self._ids = self._ids, None
        if ids is None or self.passes():
            return None
        adapter: Any = self.adapters[0]
        rows = cast(output, adapter)
        return blend(adapter, adapter.output, rows, ids.reshape(output.shape[:-1])).to(output.dtype)

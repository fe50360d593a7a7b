"""Seam of class prompts with prompts in the image tower."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapter_forms import ImagePromptAdapter
from ..errors import StateError, UnsupportedSite
from ..multimodal_prompt_site import MultimodalPromptSite
from .adapter_calls import first_argument, main_output
from .call_seam import SwitchSeam


class PromptSeam(SwitchSeam):
    """Changes the class weights, and appends tokens to the sequence of the image tower before its first `depth` blocks.

    They are removed after each of these blocks but the last, whose tokens stay until the end of the tower. The strength must be
    0 or 1, as for all inserted tokens.
    """

    adapters: Sequence[Any]

    @property
    def adapter(self) -> ImagePromptAdapter:
        """The only adapter."""
        adapter: ImagePromptAdapter = self.adapters[0]
        return adapter

    def check_strength(self, strength: float) -> None:
        """Raises `StateError` for a strength that is neither 0 nor 1."""
        if strength not in (0, 1):
            site = self.sites[0].name
            message = f"{site}: tokens of the image tower cannot be blended, so the strength must be 0 or 1, got {strength}."
            raise StateError(message, where=site, given=strength, expected=(0, 1))

    def hooks(self) -> list[RemovableHandle]:
        site: MultimodalPromptSite = self.sites[0]
        self._check_order(site)
        handles = super().hooks()
        last = self.adapter.depth - 1
        for index, tokens in enumerate(site.images[: last + 1]):
            leave = (site.images[-1] if index == last else tokens).leave
            enter = partial(self._enter, index)
            handles.append(self.module(tokens.enter.path).register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(self.module(leave.path).register_forward_hook(partial(self._leave, index)))
        return handles

    def _check_order(self, site: MultimodalPromptSite) -> None:
        """Raises `UnsupportedSite` if an earlier attachment has prompts in more blocks: its tokens would not be the last ones."""
        for other in self.owner().children():
            if isinstance(other, PromptSeam) and other is not self and other.adapter.depth > self.adapter.depth:
                message = (
                    f"{site.name}: prompts in {self.adapter.depth} blocks of the image tower, but another attachment has them in "
                    f"{other.adapter.depth}. Attach the prompts in fewer blocks first, or use the same depth."
                )
                raise UnsupportedSite(message, site=site.name, given=self.adapter.depth, expected=other.adapter.depth)

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_disabled():
            return None
        tokens = first_argument(args, kwargs)
        after = self.adapter.append(index, tokens).to(tokens.dtype)
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): after})

    def _leave(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.is_disabled():
            return None
        after = self.adapter.remove(index, main_output(output))
        return (after, *output[1:]) if isinstance(output, tuple) else after

"""The seam of control: residuals that are added to a tower's skip and middle features, or to what its first block gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConditionError
from ..method import Adapter
from ..sites import Port
from .adapter_calls import first, main_output
from .call_seam import HookSeam


@dataclass(frozen=True)
class Residuals:
    """What an adapter adds in one call, each None for nothing.

    Args:
        skips: one for each skip feature. `middle`: for the middle.
        inner: one for each block of the way down (and the middle), inside it.
    """

    skips: Sequence[Tensor] | None = None
    middle: Tensor | None = None
    inner: Sequence[Tensor] | None = None


class ResidualSeam(HookSeam):
    """Adds what adapters give to the arguments of the tower's call, beside what is there already.

    The adapter's `residuals(call)` gets the call's arguments by name and returns `Residuals`; one with `change(features)` also
    changes the features at its `place`, a `Port`. What is given at strength 1 is multiplied here.
    """

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[Any, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.home = parts[0][0].path

    def hooks(self) -> list[RemovableHandle]:
        adapter: Any = self.adapters[0]
        handles = [self.module(self.home).register_forward_pre_hook(self._add, with_kwargs=True)]
        if hasattr(adapter, "change"):
            place: Port = adapter.place
            module = self.module(place.path)
            if place.side == "in":
                handles.append(module.register_forward_pre_hook(self._change_input, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(self._change_output))
        return handles

    def passes(self) -> bool:
        adapter: Any = self.adapters[0]
        return self.asleep() or adapter.conditions is None or adapter.conditions.strength == 0

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.passes():
            return None
        site, adapter = self.sites[0], self.adapters[0]
        call = {**dict(zip(site.arguments, args, strict=False)), **kwargs}
        found: Residuals = adapter.residuals(call)  # type: ignore[operator]
        like = call[site.arguments[0]]
        for name, more in ((site.skips, found.skips), (site.middle, found.middle), (site.inner, found.inner)):
            if more is not None:
                call[name] = self._sum(call.get(name), more, like)
        return (), call

    def _change_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.passes():
            return None
        after = self._changed(first(args, kwargs))
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): after})

    def _change_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.passes():
            return None
        after = self._changed(main_output(output))
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _changed(self, features: Tensor) -> Tensor:
        adapter: Any = self.adapters[0]
        return features + self._strong(adapter.change(features), features)

    def _sum(self, there: Any, more: Any, like: Tensor) -> Any:
        if isinstance(more, Tensor):
            scaled = self._strong(more, like)
            return scaled if there is None else there + scaled
        scaled_all = [self._strong(each, like) for each in more]
        return scaled_all if there is None else [a + b for a, b in zip(there, scaled_all, strict=True)]

    def _strong(self, value: Tensor, like: Tensor) -> Tensor:
        """At its strength, in the host's dtype."""
        adapter: Any = self.adapters[0]
        return (value * (adapter.strength * adapter.conditions.strength).to(value.dtype)).to(like.dtype)


def image_for(call: Mapping[str, Any], site: Any, now: Any, name: str) -> Tensor:
    """The given picture, (batch, channels, height, width) in the pixels that the latents stand for.

    Raises:
        ConditionError: another size.
    """
    image: Tensor = now.values["image"]
    height, width = (side * site.pixels for side in call[site.arguments[0]].shape[-2:])
    if tuple(image.shape[-2:]) != (height, width):
        raise ConditionError(
            f"{name}: a picture of {image.shape[-1]}×{image.shape[-2]} was given, and pictures of {width}×{height} are drawn. "
            f"Resize it: image.resize(({width}, {height})).",
            where=name,
            given=tuple(image.shape[-2:]),
            expected=(height, width),
        )
    return image

"""The seam of control adapters: residuals added to a tower's skip and middle features, or to the output of its first block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapter_forms import FeatureAdapter, ResidualAdapter
from ..errors import ConditionError
from ..method import Adapter
from .adapter_calls import first_argument, main_output
from .seam import HookSeam


class ResidualSeam(HookSeam):
    """Passes an adapter's residuals to the tower as arguments, added to those that the caller passes.

    The adapter's `residuals(call)` receives the arguments of the forward pass by name and returns `Residuals`. The result of
    `change(features)`, which is optional, is added to the features at the port `place` of the adapter. The seam multiplies both
    by the strength.
    """

    adapters: Sequence[ResidualAdapter]

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[Any, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.home = parts[0][0].path

    def hooks(self) -> list[RemovableHandle]:
        adapter = self.adapters[0]
        handles = [self.module(self.home).register_forward_pre_hook(self._add, with_kwargs=True)]
        if isinstance(adapter, FeatureAdapter):
            module = self.module(adapter.place.path)
            if adapter.place.side == "in":
                handles.append(module.register_forward_pre_hook(self._change_input, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(self._change_output))
        return handles

    def is_bypassed(self) -> bool:
        conditions = self.adapters[0].conditions
        return self.is_disabled() or conditions is None or conditions.strength == 0

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_bypassed():
            return None
        site = self.sites[0]
        call = {**dict(zip(site.arguments, args, strict=False)), **kwargs}
        residuals = self.adapters[0].residuals(call)
        like = call[site.arguments[0]]
        for name, value in ((site.skips, residuals.skips), (site.middle, residuals.middle), (site.inner, residuals.inner)):
            if value is not None:
                call[name] = self._add_scaled(call.get(name), value, like)
        return (), call

    def _change_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_bypassed():
            return None
        after = self._add_change(first_argument(args, kwargs))
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): after})

    def _change_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.is_bypassed():
            return None
        after = self._add_change(main_output(output))
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _add_change(self, features: Tensor) -> Tensor:
        adapter: Any = self.adapters[0]  # a FeatureAdapter: the hooks are registered for no other
        return features + self._scale(adapter.change(features), features)

    def _add_scaled(self, passed: Any, residuals: Tensor | Sequence[Tensor], like: Tensor) -> Any:
        """The residuals times the strength, plus those that the caller passed."""
        if isinstance(residuals, Tensor):
            scaled = self._scale(residuals, like)
            return scaled if passed is None else passed + scaled
        scaled_all = [self._scale(residual, like) for residual in residuals]
        return scaled_all if passed is None else [a + b for a, b in zip(passed, scaled_all, strict=True)]

    def _scale(self, value: Tensor, like: Tensor) -> Tensor:
        """The value times the strength, in the host's dtype."""
        adapter = self.adapters[0]
        return (value * (adapter.strength * adapter.conditions.strength).to(value.dtype)).to(like.dtype)


def image_for(call: Mapping[str, Any], site: Any, conditions: Any, name: str) -> Tensor:
    """The control image of the current forward pass, (batch, channels, height, width), in the size of the generated image.

    Raises:
        ConditionError: it has another size.
    """
    image: Tensor = conditions.values["image"]
    height, width = (side * site.pixels for side in call[site.arguments[0]].shape[-2:])
    if tuple(image.shape[-2:]) != (height, width):
        raise ConditionError(
            f"{name}: the control image is {image.shape[-1]}×{image.shape[-2]}, and images of {width}×{height} are generated. "
            f"Resize it: image.resize(({width}, {height})).",
            where=name,
            given=tuple(image.shape[-2:]),
            expected=(height, width),
        )
    return image

"""Attributes of modules that are set while they compute gradients, for modules that stop gradients in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class GradientMode:
    """Hooks that set attributes of one module for the time of its forward pass, if that computes gradients.

    Without gradients the module runs as it is set, such as its faster path for evaluation. Children keep their mode.

    Args:
        attributes: name to value, such as `{"training": True}`.
    """

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        self.attributes = dict(attributes)
        self._saved: list[dict[str, Any]] = []

    def register(self, module: nn.Module) -> Iterator[Any]:
        """Registers the hooks; yields their handles. The last of several attachments restores first."""
        yield module.register_forward_pre_hook(self._enter)
        yield module.register_forward_hook(self._leave, prepend=True, always_call=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._saved.append({name: getattr(module, name) for name in self.attributes})
        if torch.is_grad_enabled():
            for name, value in self.attributes.items():
                setattr(module, name, value)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for name, value in self._saved.pop().items():
            setattr(module, name, value)


def register_gradient_modes(model: nn.Module, modes: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Hooks on every module of a class in `modes`, a name of a class to its attributes. Returns their handles."""
    modules = [module for module in model.modules() if type(module).__name__ in modes]
    return [handle for module in modules for handle in GradientMode(modes[type(module).__name__]).register(module)]

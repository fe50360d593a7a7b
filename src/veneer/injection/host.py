"""Base class of hosts. A host describes the sites of one family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from .sites import Site


class Host(ABC):
    """Describes the sites of one family of models. A module of `veneer.hosts` registers the host whose `name` is its stem.

    Class attributes:
        name: stem of the module's file.
        tower: label of its sites in patterns (`vision`, `unet`, `dit`, `text`).
        library: import name of the package of the models; imported only inside methods.
        main: True if patterns without a tower select from this tower of a pipeline.
        fallback: True if every other host that matches a model is preferred.
    """

    name: ClassVar[str]
    tower: ClassVar[str]
    library: ClassVar[str]
    main: ClassVar[bool] = True
    fallback: ClassVar[bool] = False

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """True for models of this family. Must not import the library: compare class names, see `module_names`."""

    @abstractmethod
    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        """Yields every site, in the order of the forward pass.

        Args:
            model: the tower's root module.
            component: its name in a pipeline (`unet`, `text_encoder_2`), or `""`.
            components: all components of the pipeline, for hosts that need another one (a tokenizer).
        Site names and paths are relative to `model`; `towers` adds the component to names.
        """

    @abstractmethod
    def sample(self, model: nn.Module) -> dict[str, Any]:
        """Small keyword inputs for one forward pass of `model`, on its device and in its dtype."""

    def gradient_hooks(self, model: nn.Module) -> list[Any]:
        """Registers hooks on modules that stop gradients otherwise, for the time of an attachment; returns their handles."""
        return []

    def float32_modules(self, model: nn.Module) -> tuple[str, ...]:
        """Parts of the paths of modules that take and return float32 in a model of any dtype, such as embeddings of the time."""
        return ()

    @abstractmethod
    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        """Builders of small models with the real classes, for tests: fast, without downloads. The caller sets the seed."""

    def core(self) -> tuple[str, ...]:
        """Names of the small models on which every method is checked, by default all; on others, one method per mechanism is."""
        return tuple(self.tiny())


def module_names(model: nn.Module) -> set[str]:
    """Qualified names of the model's class and its base classes, for `Host.matches`."""
    return {f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__}

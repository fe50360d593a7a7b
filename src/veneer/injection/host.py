"""What a host is: a description of the sites of one family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from .sites import Site


class Host(ABC):
    """One family of models. The file is the registration: stem == `name`.

    Class attributes:
        name: the file's stem.
        tower: the tower word of its sites (`vision`, `unet`, `dit`, `text`).
        library: import name of the package that holds the models; imported only inside methods.
        main: True if patterns without a tower mean this tower when a whole pipeline is given.
    """

    name: ClassVar[str]
    tower: ClassVar[str]
    library: ClassVar[str]
    main: ClassVar[bool] = True

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """True for the models of this family, without importing the library (look at the class's module names)."""

    @abstractmethod
    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        """Yield every site, in the order of the forward pass.

        Args:
            model: the tower's root module.
            component: its name in a pipeline (`unet`, `text_encoder_2`), or `""`.
            components: the pipeline's other parts, for hosts that need one (a tokenizer).
        Site names and paths are relative to `model`; the registry prefixes names with the component.
        """

    @abstractmethod
    def sample(self, model: nn.Module) -> dict[str, Any]:
        """Small keyword inputs for one forward pass of `model`, on its device and in its dtype."""

    @abstractmethod
    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        """Builders of small real models of the family, for tests: millisecond forwards, no download, seeded by the caller."""


def module_names(model: nn.Module) -> set[str]:
    """`module.Class` of the model's class and its bases, for `Host.matches`."""
    return {f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__}

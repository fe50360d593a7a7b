"""Names between a pipeline and its parts: an adapter of `pipe.unet` fits `pipe`, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..injection import LoadError
from ._reading import File


@dataclass(frozen=True)
class Move:
    """Where the components of a file are in the model at hand.

    Args:
        components: component in the file to component in the model. `towers`: component in the file to module.
    """

    components: Mapping[str, str]
    towers: Mapping[str, nn.Module]

    @classmethod
    def of(cls, file: File, bases: Mapping[str, Any], here: Mapping[str, nn.Module]) -> Move:
        """Components of the same name, else the only one of the same class.

        Raises:
            LoadError: the model has no such component.
        """
        found: dict[str, str] = {}
        for component, base in bases.items():
            alike = [c for c, m in here.items() if type(m).__name__ == base.get("class") and c not in bases]
            if component not in here and len(alike) != 1:
                has = ", ".join(f"{c or 'model'} ({type(m).__name__})" for c, m in here.items())
                raise LoadError(
                    f"{file.path}: made for {component or 'a bare model'} ({base.get('class')}); there is {has}. "
                    "Load it on the pipeline or the model that it was made for."
                )
            found[component] = component if component in here else alike[0]
        return cls(found, {saved: here[now] for saved, now in found.items()})

    @property
    def trivial(self) -> bool:
        """True if every component has its own name here."""
        return all(a == b for a, b in self.components.items())

    def name(self, name: str) -> str:
        """A site name or tensor name of the file, as it is in the model."""
        for saved, now in self.components.items():
            if not saved or name.startswith(saved + "."):
                rest = name[len(saved) + 1 :] if saved else name
                return f"{now}.{rest}" if now else rest
        return name

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A method's config whose options by site (`{"name:unet.conv_in": …}`) are under the names in the model."""
        return {key: self._option(value) for key, value in config.items()}

    def _option(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {("name:" + self.name(k[5:]) if k.startswith("name:") else k): v for k, v in value.items()}

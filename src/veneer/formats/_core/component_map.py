"""Names between a pipeline and its parts: an adapter of `pipe.unet` fits `pipe`, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.injection import LoadError

from .._io.reader import File


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
                    "Load it on the pipeline or the model that it was made for.",
                    file=file.path,
                    where=component or "model",
                    given={c: type(m).__name__ for c, m in here.items()},
                    expected=base.get("class"),
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


def other_base(file: File, component: str, saved: Mapping[str, Any], found: Mapping[str, Any]) -> LoadError:
    """The error that a file was trained on another base: with what is here, and what the file was made for."""
    told, given, expected = _difference(saved, found)
    where = component or "model"
    return LoadError(
        f"{file.path}: trained on another base. {where}: {told}. Load the base that it was trained on, or pass base='any' if you "
        "mean it.",
        file=file.path,
        where=where,
        option="base",
        given=given,
        expected=expected,
    )


def _difference(saved: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """How two bases differ: in words, what is here, and what the file was made for."""
    if saved.get("class") != found["class"]:
        return f"it was a {saved.get('class')} and is a {found['class']}", found["class"], saved.get("class")
    old, new = saved.get("config"), found["config"]
    if isinstance(old, dict) and old != new:
        keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        told = "; ".join(f"{k} was {old.get(k)} and is {new.get(k)}" for k in keys[:4])
        return told, {k: new.get(k) for k in keys}, {k: old.get(k) for k in keys}
    here, there = found["fingerprint"], saved.get("fingerprint")
    told = f"the weights differ (fingerprint {str(there)[:12]}… was saved, {str(here)[:12]}… is here)"
    return told, here, there

"""Maps component names between a pipeline and its parts: an adapter of `pipe.unet` loads on `pipe`, and the reverse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.injection import LoadError

from .._io.reader import File


@dataclass(frozen=True)
class ComponentMap:
    """Mapping from the components of a file to those of a model.

    Args:
        components: component in the file -> component in the model. `towers`: component in the file -> module.
    """

    components: Mapping[str, str]
    towers: Mapping[str, nn.Module]

    @classmethod
    def match(cls, file: File, bases: Mapping[str, Any], here: Mapping[str, nn.Module]) -> ComponentMap:
        """Matches components by name, else by class if exactly one has it.

        Raises:
            LoadError: the model has no such component.
        """
        found: dict[str, str] = {}
        for component, base in bases.items():
            alike = [c for c, m in here.items() if type(m).__name__ == base.get("class") and c not in bases]
            if component not in here and len(alike) != 1:
                has = ", ".join(f"{c or 'model'} ({type(m).__name__})" for c, m in here.items())
                raise LoadError(
                    f"{file.path}: made for {component or 'a bare model'} ({base.get('class')}); the model has {has}. "
                    "Load it on the pipeline or model it was made for.",
                    file=file.path,
                    where=component or "model",
                    given={c: type(m).__name__ for c, m in here.items()},
                    expected=base.get("class"),
                )
            found[component] = component if component in here else alike[0]
        return cls(found, {saved: here[now] for saved, now in found.items()})

    @property
    def is_identity(self) -> bool:
        """True if no component is renamed."""
        return all(a == b for a, b in self.components.items())

    def name(self, name: str) -> str:
        """A site name or tensor name of the file, renamed for the model."""
        for saved, now in self.components.items():
            if not saved or name.startswith(saved + "."):
                rest = name[len(saved) + 1 :] if saved else name
                return f"{now}.{rest}" if now else rest
        return name

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A method's config with the site names of its options (`{"name:unet.conv_in": …}`) renamed for the model."""
        return {key: self._option(value) for key, value in config.items()}

    def _option(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {("name:" + self.name(k[5:]) if k.startswith("name:") else k): v for k, v in value.items()}


def base_mismatch(file: File, component: str, saved: Mapping[str, Any], found: Mapping[str, Any]) -> LoadError:
    """The error for a file trained on another base: holds the base of the model and the base of the file."""
    text, given, expected = _difference(saved, found)
    where = component or "model"
    return LoadError(
        f"{file.path}: trained on another base. {where}: {text}. Load the base it was trained on, or pass base='any' to "
        "skip this check.",
        file=file.path,
        where=where,
        option="base",
        given=given,
        expected=expected,
    )


def _difference(saved: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """How two bases differ: description, value in the model, value in the file."""
    if saved.get("class") != found["class"]:
        return f"the file's class is {saved.get('class')}, the model's is {found['class']}", found["class"], saved.get("class")
    old, new = saved.get("config"), found["config"]
    if isinstance(old, dict) and old != new:
        keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        text = "; ".join(f"{k} is {old.get(k)} in the file and {new.get(k)} in the model" for k in keys[:4])
        return text, {k: new.get(k) for k in keys}, {k: old.get(k) for k in keys}
    here, there = found["fingerprint"], saved.get("fingerprint")
    text = f"weights differ (fingerprint {str(there)[:12]}… in the file, {str(here)[:12]}… in the model)"
    return text, here, there


def quantization_remark(component: str, saved: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """A remark if the quantization of a tower differs from that of training, which is no error."""
    before, now = _quantization(saved), _quantization(found)
    if before != now:
        name, error = component or "the model", "the error of the quantization"
        if "loftq" in before:
            error += f", and a LoRA of init='loftq' has the correction of {before} in its weights; quantize the base with it"
        yield f"the base '{name}' was {before} in training and is {now} here: outputs differ by {error}"


def _quantization(base: Mapping[str, Any]) -> str:
    """The kind of quantization, with rank and iterations of its correction, such as `nf4+loftq16x5`; `float` without one."""
    recipe = base.get("quantization")
    if not isinstance(recipe, dict):
        return "float"
    correction = recipe.get("loftq")
    suffix = "+loftq" + "x".join(str(n) for n in correction[:2]) if isinstance(correction, list) else ""
    return f"{recipe.get('kind')}{suffix}"[:80]

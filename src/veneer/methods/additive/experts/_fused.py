"""The frozen adapters that a method is trained on top of: read from files, compared, and built as buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from veneer.injection.attachment.deferred_init import check_size
from veneer.injection.attachment.files import StoredAdapter, file_functions
from veneer.injection.attachment.fingerprint import identity
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.injection.registry import methods
from veneer.injection.sites import BranchSite, StreamSite
from veneer.methods.additive.bottleneck._bottleneck import Bottleneck


@dataclass(frozen=True)
class FusedAdapters:
    """Adapters of one bottleneck method, equal options and equal sites.

    Args:
        method: their config. `stored`: their files. `checked`: components whose base model was compared.
    """

    method: Method
    stored: tuple[StoredAdapter, ...]
    checked: set[tuple[str, int]] = field(default_factory=set, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files, or of their folders if the files are all named alike."""
        paths = [Path(each.file) for each in self.stored]
        alike = len({path.stem for path in paths}) < len(paths)
        return tuple(path.parent.name if alike else path.stem for path in paths)

    def check_base(self, name: str, component: str, tower: nn.Module) -> None:
        """Compares a component with the one that the adapters were trained on, once.

        Raises:
            OptionError: it is another base model.
        """
        first = self.stored[0]
        saved = first.base.get(component)
        if (component, id(tower)) in self.checked or saved is None:
            return
        self.checked.add((component, id(tower)))
        here = identity(tower, saved["without"])
        for key in ("class", "config", "fingerprint"):
            if None not in (saved.get(key), here[key]) and saved[key] != here[key]:
                message = (
                    f"{name}: {first.file} was trained on another base model than '{component or 'model'}': {key} is "
                    f"{_shorten(saved[key])}, here {_shorten(here[key])}. Fuse adapters on the model that they were trained on."
                )
                raise OptionError(message, option="adapters", method=name, where=key, given=saved[key], expected=here[key])


def read_fused(name: str, files: Sequence[str]) -> FusedAdapters:
    """Reads the files of the adapters, one in each; heads beside them are ignored.

    Args:
        name: of the method that fuses them, for errors.
    Raises:
        LoadError: a file cannot be read. OptionError: methods, options, sites or base models differ.
    """
    stored = tuple(_bottleneck_of(name, file, file_functions().read(file)) for file in files)
    first = stored[0]
    for other in stored[1:]:
        for what, given, expected in (
            ("method", other.method.name, first.method.name),
            ("options", other.method.config(), first.method.config()),
            ("sites", sorted(other.sites), sorted(first.sites)),
            ("base", _classes(other), _classes(first)),
            ("fingerprint", *_fingerprints(other, first)),
        ):
            if given != expected:
                message = (
                    f"{name}: {other.file} has another {what} than {first.file}: {_shorten(given)}, {_shorten(expected)}. Fuse "
                    "adapters of one method with equal options, sites and base model."
                )
                raise OptionError(message, option="adapters", method=name, where=what, given=given, expected=expected)
    return FusedAdapters(first.method, stored)


def _bottleneck_of(name: str, file: str, adapters: Sequence[StoredAdapter]) -> StoredAdapter:
    suitable = [a for a in adapters if any(issubclass(need.site, (BranchSite, StreamSite)) for need in a.method.needs)]
    if len(suitable) != 1:
        given = tuple(a.method.name for a in adapters)
        message = f"{name}: {file} has {', '.join(given)}; expected one adapter of a bottleneck method, such as pfeiffer."
        raise OptionError(message, option="adapters", method=name, where=str(file), given=given, expected="one bottleneck method")
    return suitable[0]


def _classes(stored: StoredAdapter) -> dict[str, Any]:
    return {component: (base.get("class"), base.get("config")) for component, base in stored.base.items()}


def _fingerprints(one: StoredAdapter, other: StoredAdapter) -> tuple[Any, Any]:
    """Fingerprints of the bases where both leave out the same tensors, such as the head."""
    same = [c for c, base in one.base.items() if c in other.base and base["without"] == other.base[c]["without"]]
    return {c: one.base[c]["fingerprint"] for c in same}, {c: other.base[c]["fingerprint"] for c in same}


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def inner_method(name: str, fused: Mapping[str, Any]) -> Method:
    """The config of the fused adapters.

    Args:
        fused: `{"method": name, "options": {…}}`.
    Raises:
        OptionError: there is no such method.
    """
    options = fused.get("options", {})
    if fused.get("method") not in methods.names() or not isinstance(options, Mapping):
        raise OptionError.of(name, "fused", dict(fused), "{'method': the name of a bottleneck method, 'options': its options}")
    return methods.get(fused["method"]).from_config(options)


def build_frozen(
    name: str, inner: Method, site: Any, count: int, stored: Sequence[StoredAdapter], ports: Collection[str]
) -> list[Bottleneck]:
    """The frozen adapters of one site, with the tensors of their files, or initial ones without files.

    Args:
        name: of the method that fuses them, for errors. `ports`: those that the adapters may read, see `Adapter.input_port`.
    Raises:
        OptionError: the method builds no bottleneck here that can be fused, a file lacks the site, or a tensor has another shape.
    """
    check_size(lambda: inner.count(site) * count, site.name)
    adapters = [_fusible(name, inner, site, ports) for _ in range(count)]
    for number, adapter in enumerate(adapters):
        freeze(adapter)
        if stored:
            _load(name, site.name, adapter, stored[number])
    return adapters


def _fusible(name: str, inner: Method, site: Any, ports: Collection[str]) -> Bottleneck:
    """A new adapter whose parameters are all its own, and which needs no more than its input and the branch."""
    adapter = inner.build(site)
    if not isinstance(adapter, Bottleneck):
        message = f"{name}: {inner.name} builds no bottleneck at {site.name}; fuse adapters such as pfeiffer or houlsby."
        raise OptionError(message, option="fused", method=name, where=site.name, given=inner.name, expected="a bottleneck")
    has_parts = any(True for _ in adapter.children()) or inner.build_shared([site]) is not None
    if has_parts or adapter.input_port not in ports:
        message = (
            f"{name}: {inner.name} at {site.name} depends on other layers of the model or changes the input of a block; fuse "
            "adapters such as pfeiffer or houlsby."
        )
        raise OptionError(message, option="fused", method=name, where=site.name, given=inner.name, expected=tuple(sorted(ports)))
    return adapter


def _load(name: str, site: str, adapter: nn.Module, stored: StoredAdapter) -> None:
    for key, target in list(adapter.state_dict().items()):
        source = stored.tensors.get(f"{site}:{key}")
        given = None if source is None else tuple(source.shape)
        if source is None or given != tuple(target.shape):
            has = "no such tensor" if given is None else f"shape {given}"
            message = (
                f"{name}: {site}:{key} needs shape {tuple(target.shape)}; {stored.file} has {has}. Fuse adapters that were "
                "trained on this model, at their sites."
            )
            raise OptionError(
                message, option="adapters", method=name, where=f"{site}:{key}", given=given, expected=tuple(target.shape)
            )
        if not target.is_meta:
            setattr(adapter, key, source.clone())  # in its dtype, until the adapter is moved to that of the model


def freeze(module: nn.Module) -> None:
    """Turns the parameters of a module into buffers: saved, moved and cast with it, never trained."""
    for key, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, key)
        module.register_buffer(key, parameter.detach())


def as_option(method: Method) -> dict[str, Any]:
    """Value of the option `fused` for adapters of a config."""
    return {"method": method.name, "options": dataclasses.replace(method).config()}

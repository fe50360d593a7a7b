"""Records the module trees of diffusers' and transformers' models on the meta device.

    python -m veneer.base_models.skeletons.recording

writes the file from which `meta_modules` builds. Run it after a change of `architectures.py` or of what hosts read of a model.
"""

from __future__ import annotations

import gzip
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.base_models.architectures import ARCHITECTURES, library_architecture

from .meta_modules import FILE, ClassRecord, Library, ModelRecord, ModuleRecord

METHODS = ("get_processor", "unfuse_projections")  # by which hosts recognize attention modules
OBJECTS = ("processor",)  # attributes of which hosts read the class
LIBRARY_ENTRIES = ("_diffusers_version", "transformers_version", "_name_or_path", "_use_default_values")
SIMPLE = (bool, int, float, str, type(None))
PLAIN = {*nn.Module().__dict__} - {"training"}


class Recorder:
    """Collects models in a `Library`, equal modules and classes once."""

    def __init__(self) -> None:
        self.library = Library(classes=[], modules=[], models={})
        self.indices: dict[str, int] = {}

    def model(self, model: Any) -> ModelRecord:
        """The record of a root module.

        Raises:
            ValueError: a module occurs at two paths, which a tree cannot hold.
        """
        paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
        if len(paths) != len(list(model.modules())):
            raise ValueError(f"{type(model).__name__}: a module occurs at two paths; expected a tree.")
        root = self._module(model, arguments=[*inspect.signature(type(model).forward).parameters][1:])
        first: dict[int, str] = {}
        ties = {n: at for n, p in model.named_parameters(remove_duplicate=False) if (at := first.setdefault(id(p), n)) != n}
        config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
        known = {k: v for k, v in sorted(config.items()) if k not in LIBRARY_ENTRIES and _is_json(v)}
        return ModelRecord(root=root, config=known, ties=ties)

    def _module(self, module: nn.Module, arguments: list[str] | None = None) -> int:
        attributes = {k: v for k, v in vars(module).items() if k not in PLAIN and self._is_recorded(module, k, v)}
        if attributes["training"]:
            del attributes["training"]  # the default
        implementation = getattr(vars(module).get("config"), "_attn_implementation", None)
        if isinstance(implementation, str) and arguments is None:
            attributes["attention_implementation"] = implementation
        objects = {k: {"class": self._class(type(vars(module)[k]))} for k in OBJECTS if k in vars(module)}
        record = ModuleRecord(
            kind=self._class(type(module), arguments),
            attributes=attributes | objects,
            parameters=_tensors(module._parameters),
            buffers=_tensors(module._buffers),
            unsaved=sorted(module._non_persistent_buffers_set),
            children={name: None if child is None else self._module(child) for name, child in module._modules.items()},
        )
        return self._index(self.library["modules"], record)

    def _is_recorded(self, module: nn.Module, name: str, value: Any) -> bool:
        private = name.startswith("_") and not type(module).__module__.startswith("torch.")
        return not private and _is_simple(value)

    def _class(self, kind: type, arguments: list[str] | None = None) -> int:
        methods = [name for name in METHODS if hasattr(kind, name)]
        name = f"{kind.__module__}.{kind.__qualname__}"
        record = ClassRecord(name=name, attributes=_class_attributes(kind), methods=methods, arguments=arguments or [])
        return self._index(self.library["classes"], record)

    def _index(self, records: list[Any], record: Any) -> int:
        """Index of a record among equal ones."""
        key = f"{id(records)} {json.dumps(record, sort_keys=True)}"
        if key not in self.indices:
            self.indices[key] = len(records)
            records.append(record)
        return self.indices[key]


def _class_attributes(kind: type) -> dict[str, Any]:
    """Public attributes of a class of a library and its bases, without those of `nn.Module`."""
    own = {} if kind.__module__.startswith("torch.") else dict.fromkeys(set(dir(kind)) - set(dir(nn.Module)))
    values = {name: inspect.getattr_static(kind, name) for name in sorted(own) if not name.startswith("_")}
    return {name: value for name, value in values.items() if _is_simple(value)}


def _tensors(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {k: None if t is None else (list(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in tensors.items()}


def _is_simple(value: Any) -> bool:
    return isinstance(value, SIMPLE) or (isinstance(value, (tuple, list)) and all(map(_is_simple, value)))


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    return _is_simple(value)


def record_all() -> Library:
    """The module trees of all architectures."""
    recorder = Recorder()
    for name in ARCHITECTURES:
        models = {
            part: recorder.model(model)
            for part, model in library_architecture(name).components.items()
            if isinstance(model, nn.Module)
        }
        recorder.library["models"][name] = models
    return recorder.library


def main() -> None:
    """Writes the file of the package."""
    text = json.dumps(record_all(), separators=(",", ":"))
    (Path(__file__).parent / FILE).write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()

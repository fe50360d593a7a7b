"""Builds modules on the meta device from stored module trees, without importing diffusers or transformers, which takes seconds.

A tree has what hosts, formats and adapters read of a model: class names, simple attributes, configs, and the shapes of
parameters. Layers of torch have their own classes. Other modules have classes with the names of the library's, which cannot run.
"""

from __future__ import annotations

import functools
import gzip
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any, TypedDict

import torch
from torch import nn

FILE = "skeletons.json.gz"
NESTED_CLIP = 5, 6  # version of transformers from which CLIPTextModel has no level `text_model`
NESTED_KIND = "transformers.models.clip.modeling_clip.CLIPTextTransformer"


class ClassRecord(TypedDict):
    """A class: its qualified name, attributes, methods by which hosts recognize it, and arguments of a root's `forward`."""

    name: str
    attributes: dict[str, Any]
    methods: list[str]
    arguments: list[str]


class ModuleRecord(TypedDict):
    """A module: index of its class, attributes, shapes and dtypes of its tensors, and indices of its children's records.

    Attributes with an object of another class have the class as `{"class": index}`. Tensors and children may be None.
    `unsaved`: buffers that are not in the state dict.
    """

    kind: int
    attributes: dict[str, Any]
    parameters: dict[str, tuple[list[int], str] | None]
    buffers: dict[str, tuple[list[int], str] | None]
    unsaved: list[str]
    children: dict[str, int | None]


class ModelRecord(TypedDict):
    """A root module: index of its record, its config, and paths of tied parameters with the path of the parameter itself."""

    root: int
    config: dict[str, Any]
    ties: dict[str, str]


class Library(TypedDict):
    """The file: equal classes and modules are stored once. `models`: architecture to component to root module."""

    classes: list[ClassRecord]
    modules: list[ModuleRecord]
    models: dict[str, dict[str, ModelRecord]]


class Config(dict[str, Any]):
    """A config whose entries are also attributes, as in diffusers and transformers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def meta_modules(name: str) -> dict[str, nn.Module]:
    """The networks of an architecture by component, in training mode, as their constructors leave them.

    Raises:
        KeyError: there is no such architecture.
    """
    library = load_library()
    with torch.device("meta"):
        return {part: build_model(library, record) for part, record in library["models"][name].items()}


@functools.cache
def load_library() -> Library:
    """The stored module trees."""
    library: Library = json.loads(gzip.decompress(files(__package__).joinpath(FILE).read_bytes()))
    return library


def build_model(library: Library, record: ModelRecord) -> nn.Module:
    """The root module of a record, with its config and tied parameters, on the default device."""
    model = _build(library, record["root"], _classes(library))
    for path, source in record["ties"].items():
        (owner, param), (other, shared) = (p.rpartition(".")[::2] for p in (path, source))
        model.get_submodule(owner)._parameters[param] = model.get_submodule(other)._parameters[shared]
    model.__dict__["config"] = Config(record["config"])
    return _nest_clip(model) if type(model).__name__ == "CLIPTextModel" and _transformers_version() < NESTED_CLIP else model


def _build(library: Library, index: int, classes: Sequence[type]) -> nn.Module:
    record = library["modules"][index]
    kind = classes[record["kind"]]
    module: nn.Module = object.__new__(kind)
    nn.Module.__init__(module)  # torch's own layers would also initialize their parameters
    module.__dict__.update({name: _attribute(value, classes) for name, value in record["attributes"].items()})
    module._parameters.update({name: entry and nn.Parameter(_empty(*entry)) for name, entry in record["parameters"].items()})
    module._buffers.update({name: entry and _empty(*entry) for name, entry in record["buffers"].items()})
    module._non_persistent_buffers_set.update(record["unsaved"])
    children = record["children"].items()
    module._modules.update({name: None if i is None else _build(library, i, classes) for name, i in children})
    return module


def _attribute(value: Any, classes: Sequence[type]) -> Any:
    """An attribute of a module: lists are tuples, as layers of torch have them."""
    if isinstance(value, Mapping):
        return type(classes[value["class"]].__name__, (), {"__module__": classes[value["class"]].__module__})()
    return tuple(_attribute(item, classes) for item in value) if isinstance(value, list) else value


def _empty(shape: Sequence[int], dtype: str) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype))


def _classes(library: Library) -> list[type]:
    return [_class(json.dumps(record)) for record in library["classes"]]


@functools.cache
def _class(text: str) -> type:
    """The class of a record as JSON: of torch itself, or one of this name whose methods raise `NotImplementedError`."""
    record: ClassRecord = json.loads(text)
    module, _, name = record["name"].rpartition(".")
    if module.partition(".")[0] == "torch":
        kind: type = getattr(importlib.import_module(module), name)
        return kind
    content = {name: _absent(name) for name in record["methods"]} | record["attributes"]
    if record["arguments"]:
        content["forward"] = _absent("forward")
        names = ("self", *record["arguments"])
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        content["forward"].__signature__ = inspect.Signature(parameters)
    return type(name, (nn.Module,), {"__module__": module, **content})


def _absent(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        message = f"{type(self).__name__}.{name}: the architecture has names and shapes only. Load the base model for this."
        raise NotImplementedError(message)

    return method


def _nest_clip(model: nn.Module) -> nn.Module:
    """The text model with the level `text_model` of earlier versions, on which the site names of native files depend."""
    kind = _class(json.dumps(ClassRecord(name=NESTED_KIND, attributes={}, methods=[], arguments=[])))
    inner: nn.Module = object.__new__(kind)
    nn.Module.__init__(inner)
    inner._modules.update(model._modules)
    model._modules.clear()
    model._modules["text_model"] = inner
    return model


def _transformers_version() -> tuple[int, ...]:
    """Major and minor version of the installed transformers; that of the stored trees if it is not installed."""
    try:
        return tuple(int(part) for part in version("transformers").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return NESTED_CLIP

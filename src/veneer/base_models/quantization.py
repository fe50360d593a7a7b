"""Quantized base models: selection of components and layers, quantization in place, and checks that a kind works on a device.

Frozen linear layers of repeated blocks are quantized after loading, one after the other, so that each float weight is freed
before the next one is quantized. Convolutions, embeddings, norms, modulation, first and last layers and the VAE stay in the
dtype of the base model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.extras import require
from veneer.injection.attachment.model_state import find_model_state
from veneer.injection.errors import BaseModelError, OptionError, StateError
from veneer.injection.quantized_weight import is_quantized
from veneer.injection.seams.seam import Seam

from .quantized_linear import KINDS, Kind, quantize_linear

Quantize = str | Path | Mapping[str, str | Path] | Sequence[str]
"""A kind or a GGUF file for the denoiser, a mapping of components to them, or a list of `KIND` and `COMPONENT=KIND`."""
DENOISERS = ("transformer", "unet")
GGUF = ".gguf"
LOFTQ, LOFTQ_ITERATIONS = re.compile(r"loftq([1-9]\d{0,4})(?:x([1-9]\d?))?"), 5
KEPT = re.compile(r"^(norm|ada|time|mod$)|emb|modulation|_mod$")
"""Names of modules in a block that are not quantized: norms, embeddings, modulation and timestep projections."""


@dataclass(frozen=True)
class QuantizedLayers:
    """Linear layers in the blocks of a component: number of quantized ones, and names of those that the kind does not support.

    Args:
        misfits: names of layers whose number of inputs is not a multiple of the kind's block size.
    """

    component: str
    kind: str
    quantized: int
    misfits: tuple[str, ...]


def parse_quantize(quantize: Quantize | None, mixed_precision: str = "no") -> dict[str, Kind | Path]:
    """Component to kind or GGUF file; the component `""` stands for the denoiser.

    Args:
        mixed_precision: autocast dtype of the run, `no` without autocast.
    Raises:
        OptionError: an unknown kind or one that does not work under autocast, a component that is listed twice, or a GGUF file
            that does not exist.
        MissingExtra: the library of a kind is not installed.
    """
    if quantize is None:
        return {}
    if isinstance(quantize, (str, Path)):
        quantize = (str(quantize),)
    pairs = list(quantize.items()) if isinstance(quantize, Mapping) else [_pair(text) for text in quantize]
    parsed: dict[str, Kind | Path] = {}
    for component, value in pairs:
        if component in parsed:
            message = f"quantize has {component or 'the denoiser'} twice; expected one kind for each component."
            raise OptionError(message, option="quantize", where=component, given=str(value))
        parsed[component] = kind = _kind_or_file(str(value))
        if mixed_precision != "no" and isinstance(kind, Kind) and not kind.autocast:
            working = tuple(name for name, other in KINDS.items() if other.autocast)
            message = f"quantize: {kind.name} does not work with --mixed-precision {mixed_precision}; expected one of {working}."
            raise OptionError(message, option="quantize", where=component, given=kind.name, expected=working)
    return parsed


def _pair(text: str) -> tuple[str, str]:
    component, sign, value = text.partition("=")
    return (component, value) if sign else ("", text)


def _kind_or_file(value: str) -> Kind | Path:
    if value.endswith(GGUF):
        file = Path(value).expanduser()
        if not file.is_file():
            message = f"quantize: no file {file}; check the path."
            raise OptionError(message, option="quantize", given=value, file=file)
        require("gguf", "diffusers")
        return file
    return _kind(value, f", or a {GGUF} file of the denoiser")


def _kind(name: str, alternative: str = "") -> Kind:
    """The kind of this name, whose library is installed. `alternative`: for the error: accepted values other than kinds.

    A name such as `nf4+loftq16x5` is a kind with a low-rank correction: its rank, and the number of iterations (default: 5).
    """
    plain, plus, suffix = name.partition("+")
    loftq = LOFTQ.fullmatch(suffix)
    if plain not in KINDS or (plus and not loftq):
        message = (
            f"quantize: no kind {name!r}; expected one of {', '.join(KINDS)}{alternative}. A rank (nf4+loftq16), or rank and "
            "iterations (nf4+loftq16x5), add the correction of LoftQ."
        )
        raise OptionError(message, option="quantize", given=name, expected=tuple(KINDS))
    require(KINDS[plain].library)
    return KINDS[plain] if not loftq else replace(KINDS[plain], loftq=(int(loftq[1]), int(loftq[2] or LOFTQ_ITERATIONS)))


def resolve_components(parsed: Mapping[str, Kind | Path], components: Sequence[str]) -> dict[str, Kind | Path]:
    """Replaces the component `""` by the name of the denoiser. `components`: names of the pipeline's components.

    Raises:
        OptionError: the pipeline has no such component, or it is quantized twice.
    """
    denoiser = next((name for name in DENOISERS if name in components), None)
    known = tuple(c for c in components if c in DENOISERS or c.startswith("text_encoder"))
    by_component: dict[str, Kind | Path] = {}
    for name, value in parsed.items():
        component = name or denoiser or ""
        if component not in known or component in by_component:
            message = f"quantize: component {name!r} cannot be quantized; expected one of {', '.join(known)}, each once."
            raise OptionError(message, option="quantize", where=name, given=name, expected=known)
        by_component[component] = value
    return by_component


def quantize_components(
    pipe: Any, kinds: Mapping[str, Kind | Path], device: str | torch.device = "cpu"
) -> tuple[QuantizedLayers, ...]:
    """Quantizes the linear layers of components of a pipeline in place.

    Args:
        kinds: component to kind, as `parse_quantize` returns it; GGUF files among them are loaded already.
        device: device on which the weights are quantized, and on which they remain.
    Returns:
        The quantized layers of each component.
    Raises:
        OptionError: the pipeline has no such component.
        BaseModelError: the kind does not work on the device, a component is quantized already, or the kind supports none of
            its layers.
        StateError: something is attached to a component.
    """
    present = [name for name, component in pipe.components.items() if component is not None]
    by_component = resolve_components(kinds, present)
    return tuple(
        quantize_model(pipe.components[component], kind, component, device)
        for component, kind in by_component.items()
        if isinstance(kind, Kind)
    )


def quantize_model(
    tower: nn.Module, kind: Kind | str, component: str = "model", device: str | torch.device | None = None
) -> QuantizedLayers:
    """Quantizes the linear layers in the repeated blocks (`nn.ModuleList`) of a model in place.

    Args:
        tower: the model. `kind`: a kind or its name. `component`: name for errors.
        device: device on which the weights are quantized, and on which they remain (default: their own).
    Returns:
        The quantized layers.
    Raises:
        OptionError: an unknown kind.
        MissingExtra: the library of the kind is not installed.
        StateError: something is attached to the model.
        BaseModelError: the model is quantized already, or the kind supports none of its layers or not the device.
    """
    kind = _kind(kind) if isinstance(kind, str) else kind
    _reject_attached(tower, component)
    if any(is_quantized(p) for p in tower.parameters()):
        message = f"quantize: {component} is quantized already; expected float weights. Load the float base model to quantize it."
        raise BaseModelError(message, where=component, given="quantized", expected="float weights")
    layers = list(linear_layers(tower))
    supported = [name for name in layers if tower.get_submodule(name).in_features % kind.block == 0]  # type: ignore[operator]
    if not supported:
        message = (
            f"quantize: {component} ({type(tower).__name__}) has {len(layers)} linear layers in its blocks, and none has a "
            f"multiple of {kind.block} inputs, which {kind.name} needs. Use another kind, such as int8."
        )
        raise BaseModelError(message, where=component, given=kind.name, expected=kind.block)
    first: Any = tower.get_submodule(supported[0])
    check_kind(kind, first.weight.device if device is None else device, first.weight.dtype)
    del first  # else its float weight stays in memory
    for name in supported:
        owner, _, child = name.rpartition(".")
        parent = tower.get_submodule(owner)
        linear: Any = parent._modules[child]
        parent._modules[child] = quantize_linear(linear if device is None else linear.to(device), kind)
        del linear  # frees the float weight
    return QuantizedLayers(component, kind.name, len(supported), tuple(name for name in layers if name not in supported))


def _reject_attached(tower: nn.Module, component: str) -> None:
    """Raises `StateError` if an attachment adapts the model, a part of it or a model that contains it."""
    states = (state for module in tower.modules() if (state := find_model_state(module)) is not None)
    attached = [attachment.name for state in states for attachment in state.attachments] + _seams(tower)
    if attached:
        message = f"quantize: {component} has '{attached[0]}' attached; detach it first, or quantize before attaching."
        raise StateError(message, where=attached[0], given="attached", expected="detached")


def _seams(tower: nn.Module) -> list[str]:
    return [path for path, module in tower.named_modules() if isinstance(module, Seam)]


def linear_layers(tower: nn.Module) -> Iterator[str]:
    """Paths of the linear layers that are quantized: those in repeated blocks, except adapters, modules that match `KEPT`, and
    modules that the model keeps in float32.
    """
    kept = set(getattr(tower, "_keep_in_fp32_modules", None) or ())
    blocks = [path for path, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
    adapters = tuple(f"{seam}." for seam in _seams(tower))
    for path, module in tower.named_modules():
        names = path.split(".")
        inside = any(path.startswith(f"{block}.") for block in blocks) and not path.startswith(adapters)
        if type(module) is nn.Linear and inside and not kept & set(names) and not any(map(KEPT.search, names)):
            yield path


def check_kind(kind: Kind, device: str | torch.device, dtype: torch.dtype) -> None:
    """Checks by a trial that a kind works on a device: its forward pass, and the gradient of its input.

    Raises:
        BaseModelError: it does not work; `expected` has the kinds that do.
    """
    error = _trial(kind, device, dtype)
    if error is not None:
        working = tuple(name for name, other in KINDS.items() if _trial(other, device, dtype) is None)
        message = (
            f"quantize: {kind.name} ({kind.library}) does not work on {device} in {dtype}: {type(error).__name__}: "
            f"{str(error)[:200]}. Kinds that work here: {', '.join(working) or 'none'}."
        )
        raise BaseModelError(message, where=str(device), given=kind.name, expected=working) from error


def _trial(kind: Kind, device: str | torch.device, dtype: torch.dtype) -> Exception | None:
    """The error of a small layer of this kind, or None."""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            linear = nn.Linear(64, 64, dtype=dtype).requires_grad_(False).to(device)
            layer = quantize_linear(linear, kind)
            x = torch.ones(2, 64, dtype=dtype, device=device, requires_grad=True)
            layer(x).float().sum().backward()
            if x.grad is None or not bool(x.grad.isfinite().all()):
                raise RuntimeError("no gradient")
    except Exception as error:  # libraries raise many kinds, also while they are imported
        return error
    return None

"""Reads the tensors of diffusers' format and peft's `LoraConfig` into veneer's methods."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from veneer.injection import LoadError, VeneerError
from veneer.injection.sites import WeightSite
from veneer.injection.towers import Tower, towers_of

from .._core.attach import AttachmentSpec
from .._core.dora_magnitudes import SCALE
from .._core.families import family_of, family_sentence
from .._core.format import LayerInfo, Options, count_parameters
from .._io.reader import File
from .._lycoris.codec import SiteTensors
from .._lycoris.lokr import LoKrCodec
from .codec import PeftCodec
from .codec import PeftModule as Module
from .config import reject_unsupported, scaled_alpha
from .low_rank import EMBEDDED, MAGNITUDE, DoRAPeft, LoKrPeft, LoRAPeft, lycoris_tensors

_NAME = r"(?:\.(?!(?:weight|bias)(?:\.|\Z))[^.]+)?"  # peft's adapter name, which old files have in their keys
_KEY = re.compile(
    r"(?:(?P<head>unet\.)?base_model\.model\.)?(?P<path>.+)\.(?P<end>"
    rf"lora_[AB](?={_NAME}\.weight\Z)|lora_magnitude_vector(?={_NAME}(?:\.weight)?\Z)|"
    rf"(?:lora_embedding_[AB]|lokr_w[12](?:_[ab])?|lokr_t2)(?={_NAME}\Z)|(?:alpha|dora_scale|magnitude)(?=\Z)).*"
)
SAFE = "W' = W + B A, as diffusers reads files without alpha"
LORA, DORA, LOKR = LoRAPeft(), DoRAPeft(), LoKrPeft()


def peft_specs(model: Any, file: File, config: Any, options: Options) -> list[AttachmentSpec]:
    """Specifications of the attachments, one per method, that have the file's ΔW at every site.

    Args:
        config: of `lora_adapter_metadata`, or None.
    Raises:
        LoadError: keys of other kinds, or modules that the model does not have.
    """
    if config is not None and not isinstance(config, dict):
        message = f"{file.path}: lora_adapter_metadata is not a JSON object. The file is corrupt."
        raise LoadError(message, file=file.path, where="lora_adapter_metadata", expected="JSON object")
    towers = towers_of(model)
    places, modules = _weights_by_path(towers), {t.component: t.module for t in towers}
    tensors = file.tensors(finite=options.strict)
    layers, unused = _group_keys(file, places)
    notes: list[str] = (
        [] if config is not None or any(".alpha" in key for key in file.shapes) else [f"no alpha in the file: {SAFE}"]
    )
    pieces: dict[str, list[SiteTensors]] = {}
    codecs: dict[str, PeftCodec] = {}
    configs = {t.component: _component_config(config, t.component or default_component(t), file) for t in towers}
    for path, keys in layers.items():
        tower, site = places[path]
        own = configs[tower.component]
        parts = {end: tensors[key] for end, key in keys.items()}
        name = site.name.removeprefix(tower.component + ".") if tower.component else site.name
        layer = Module(file, name, site, (), parts, own or {}, modules, notes=notes)
        codec, found = _read(layer, parts, own)
        pieces.setdefault(codec.method, []).extend(found)
        codecs[codec.method] = codec
    _reject_unused(file, unused, pieces, options)
    made = []
    for method, some in pieces.items():
        state = {f"{p.site.name}:{part}": t for p in some for part, t in p.state.items()}
        sites = [p.site.name for p in some]
        made.append(AttachmentSpec(method, method, codecs[method].config(some), sites, state, notes=notes, unused=unused))
        notes, unused = [], []
    return made


def _group_keys(file: File, places: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Path of each module -> its keys by suffix in peft's format; and the remaining keys."""
    layers: dict[str, dict[str, str]] = {}
    unused = []
    for key in file.shapes:
        match = _KEY.fullmatch(key)
        path = (match["head"] or "") + match["path"] if match else ""
        if match is None or path not in places:
            unused.append(key)
            continue
        end = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": MAGNITUDE}.get(match["end"], match["end"])
        parts = layers.setdefault(path, {})
        if end in parts:  # duplicate
            unused.append(key)
        parts.setdefault(end, key)
    return layers, unused


def _read(layer: Module, parts: dict[str, Tensor], config: Mapping[str, Any] | None) -> tuple[PeftCodec, list[SiteTensors]]:
    """Decodes a module. Its own `alpha`, if stored, takes precedence over the config and is applied as in the LyCORIS format."""
    alpha = parts.pop("alpha", None)
    if config == {} and alpha is None:
        why = "has no alpha: lora_adapter_metadata has no entry of this component, which diffusers rejects as well"
        raise layer.error(why, missing=["alpha"])
    if alpha is not None:
        layer.expect(alpha.numel() == 1, "a scalar alpha")
        rank = float(alpha)
        layer = Module(**{**vars(layer), "config": {"lora_alpha": rank, "alpha_pattern": {}}})
    try:
        if any(part.startswith("lokr_") for part in parts):
            if config is None or alpha is not None:
                whole = {**parts, **({} if alpha is None else {"alpha": alpha})}
                return LOKR, LoKrCodec().read(layer.as_module(whole))
            return LOKR, LOKR.read(layer)
        if SCALE in parts:
            layer.expect(MAGNITUDE not in parts, f"either {SCALE} or {MAGNITUDE}")
            return DORA, DORA.codec.read(layer.as_module({**lycoris_tensors(layer), SCALE: parts[SCALE]}))
        codec = DORA if MAGNITUDE in parts else LORA
        return codec, codec.read(layer)
    except VeneerError as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError.from_error(error, f"{layer.file.path}: {error}", file=layer.file.path) from error


def layers(file: File, config: Any) -> list[LayerInfo]:
    """Layers of a file, by the names of its modules."""
    entries = config if isinstance(config, dict) else None
    alphas = file.tensors(finite=False, names={key for key in file.shapes if key.endswith(".alpha")})
    heads = {str(key).partition(".")[0] for key in entries or ()}
    found: dict[str, dict[str, str]] = {}
    for key in file.shapes:
        if (match := _KEY.fullmatch(key)) is not None:
            found.setdefault(match["path"], {})[match["end"]] = key
    return [_layer(file, path, keys, entries, heads, alphas.get(keys.get("alpha", ""))) for path, keys in found.items()]


def _layer(
    file: File, path: str, keys: Mapping[str, str], config: dict[str, Any] | None, heads: set[str], stored_alpha: Tensor | None
) -> LayerInfo:
    """Describes a module by its shapes. `given`: its own alpha, which takes precedence over the config's."""
    shapes = {end: file.shapes[key] for end, key in keys.items()}
    dora = keys.keys() & {MAGNITUDE, "magnitude", SCALE}
    method = "lokr" if any(end.startswith("lokr_") for end in keys) else "dora" if dora else "lora"
    shape = next((shapes[end] for end in ("lora_A", EMBEDDED[0], "lokr_w2_b", "lokr_w1_b") if shapes.get(end)), None)
    rank = shape[0] if shape else None
    head, _, rest = path.partition(".")
    component, module = (head, rest.removeprefix("text_model.")) if head in heads else ("", path)
    own = _entries(config, component)
    alpha = None if rank is None or own == {} else scaled_alpha(file, own or {}, module, rank)
    if rank is not None and stored_alpha is not None and stored_alpha.numel() == 1:
        alpha = float(stored_alpha)
    return LayerInfo(path, method, rank, alpha, count_parameters(file, keys.values()))


def _weights_by_path(towers: list[Tower]) -> dict[str, tuple[Tower, WeightSite]]:
    """Paths that a file may use, and their weights: with the component or, for the main tower, without."""
    places: dict[str, tuple[Tower, WeightSite]] = {}
    for tower in towers:
        for site in (s for s in tower.sites if isinstance(s, WeightSite)):
            for path in _paths(tower, site.name):
                places.setdefault(path, (tower, site))
    return places


def _paths(tower: Tower, name: str) -> Iterator[str]:
    """Paths with and without `text_model.`, which depends on the version of transformers."""
    path = name.removeprefix(tower.component + ".") if tower.component else name
    paths = dict.fromkeys((path, path.removeprefix("text_model."), f"text_model.{path}"))
    yield from (f"{tower.component or default_component(tower)}.{p}" for p in paths)
    if tower.main or not tower.component:
        yield from paths


def default_component(tower: Tower) -> str:
    """Conventional name of a bare model's component in a pipeline."""
    return {"unet": "unet", "dit": "transformer", "text": "text_encoder"}.get(tower.host.tower, "")


def _component_config(config: Mapping[str, Any] | None, component: str, file: File) -> dict[str, Any] | None:
    """A component's config.

    Raises:
        LoadError: it says that the tensors are not the complete adapter.
    """
    own = _entries(config, component)
    if own is not None:
        reject_unsupported(file.path, own)
    return own


def _entries(config: Mapping[str, Any] | None, component: str) -> dict[str, Any] | None:
    """peft's config of a component: entries prefixed with its name, else unprefixed entries; {} without either."""
    if config is None:
        return None
    start = component + "."
    return {k.removeprefix(start): v for k, v in config.items() if k.startswith(start)} or {
        k: v for k, v in config.items() if "." not in k
    }


def _reject_unused(file: File, unused: list[str], found: Mapping[str, Any], options: Options) -> None:
    if unused and (options.strict or not found):
        raise LoadError(
            f"{file.path}: unused {len(unused)} of {len(file.shapes)} tensors: {', '.join(unused[:8])}. The model has no weights "
            "of these names, or they are not LoRA. Load it on the pipeline it was made for, or pass strict=False."
            f"{family_sentence(file)}",
            file=file.path,
            unused=unused,
            family=family_of(file.shapes) or "",
        )

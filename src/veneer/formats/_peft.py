"""Reading LoRA tensors and peft's `LoraConfig` into veneer's own lora."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..injection import LoadError
from ..injection.sites import WeightSite
from ..injection.towers import Tower, towers_of
from ._attaching import Wanted
from ._format import Layer, Options, values
from ._lora import Found, config_of
from ._reading import File

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<half>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.weight")
SAFE = "W' = W + B A, as diffusers reads files without alpha"


def wanted(model: Any, file: File, config: Any, options: Options) -> Wanted:
    """The lora attachment that gives the file's ΔW at every site.

    Args:
        config: of `lora_adapter_metadata`, or None.
    Raises:
        LoadError: keys of other things than LoRA, or modules that the model does not have.
    """
    if config is not None and not isinstance(config, dict):
        raise LoadError(f"{file.path}: its lora_adapter_metadata is no JSON object. The file is damaged.")
    places = _places(towers_of(model))
    tensors = file.tensors(finite=options.strict)
    state: dict[str, Tensor] = {}
    found: dict[str, Found] = {}
    unused: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        place = places.get(match["path"]) if match else None
        if match is None or place is None:
            unused.append(key)
            continue
        tower, site = place
        down = match["half"] == "A"
        state[f"{site.name}:{'down' if down else 'up'}"] = tensor
        if down and site.name not in found:
            found[site.name] = _settings(file, site, tower, config, tensor.shape[0] if tensor.ndim else 1)
    _refuse(file, unused, found, options)
    notes = [] if config is not None else [f"no alpha in the file: {SAFE}"]
    return Wanted("lora", "lora", config_of(found), list(found), state, notes=notes, unused=unused)


def layers(file: File, config: Any) -> list[Layer]:
    """What is in a file, by the names of its modules."""
    told = config if isinstance(config, dict) else None
    heads = {str(key).partition(".")[0] for key in told or ()}
    dora = any("lora_magnitude_vector" in key for key in file.shapes)
    found = []
    for key, shape in file.shapes.items():
        match = _KEY.fullmatch(key)
        if match is not None and match["half"] == "A" and shape:
            head, _, rest = match["path"].partition(".")
            component, module = (head, rest.removeprefix("text_model.")) if head in heads else ("", match["path"])
            alpha = alpha_of(file, component, module, told, shape[0])
            found.append(Layer(match["path"], "dora" if dora else "lora", shape[0], alpha, values(file, match["path"] + ".")))
    return found


def _places(towers: list[Tower]) -> dict[str, tuple[Tower, WeightSite]]:
    """Paths that a file may have, and the weights that they mean: with the component or, for the main tower, without."""
    places: dict[str, tuple[Tower, WeightSite]] = {}
    for tower in towers:
        for site in (s for s in tower.sites if isinstance(s, WeightSite)):
            for path in _paths(tower, site.name):
                places.setdefault(path, (tower, site))
    return places


def _paths(tower: Tower, name: str) -> Iterator[str]:
    """`text_model.` comes and goes with the version of transformers."""
    path = name.removeprefix(tower.component + ".") if tower.component else name
    paths = dict.fromkeys((path, path.removeprefix("text_model."), f"text_model.{path}"))
    yield from (f"{tower.component or _usual(tower)}.{p}" for p in paths)
    if tower.main or not tower.component:
        yield from paths


def _usual(tower: Tower) -> str:
    """What a bare model is called in a pipeline."""
    return {"unet": "unet", "dit": "transformer", "text": "text_encoder"}.get(tower.host.tower, "")


def _settings(file: File, site: WeightSite, tower: Tower, config: Mapping[str, Any] | None, rank: int) -> Found:
    module = site.name.removeprefix(tower.component + ".") if tower.component else site.name
    return Found(site, rank, alpha_of(file, tower.component or _usual(tower), module, config, rank))


def alpha_of(file: File, component: str, module: str, config: Mapping[str, Any] | None, rank: int) -> float:
    """Alpha of a module in peft's config, or its rank where there is no config.

    Raises:
        LoadError: the config is damaged.
    """
    if config is None:
        return float(rank)
    own = {k.removeprefix(component + "."): v for k, v in config.items() if k.startswith(component + ".")} or config
    try:
        alpha = float(_by_pattern(own.get("alpha_pattern") or {}, module, own.get("lora_alpha", rank)))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise LoadError(
            f"{file.path}: its lora_adapter_metadata gives no alpha for '{module}' ({error}). It is damaged."
        ) from error
    return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the module's path or its end."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


def _refuse(file: File, unused: list[str], found: Mapping[str, Found], options: Options) -> None:
    dora = [key for key in unused if "lora_magnitude_vector" in key]
    if dora:
        raise LoadError(f"{file.path}: DoRA ({dora[0]}): without its magnitudes the rest would be wrong, so nothing is loaded.")
    if unused and (options.strict or not found):
        raise LoadError(
            f"{file.path}: unused {len(unused)} of {len(file.shapes)} tensors: {', '.join(unused[:8])}. The model has no weights "
            "of these names, or they are no LoRA: load it on the pipeline that it was made for, or pass strict=False."
        )

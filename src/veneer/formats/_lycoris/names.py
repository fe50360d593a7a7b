"""Module names in the LyCORIS format: those of kohya, or `lycoris_` and the path in the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from veneer.injection import LoadError
from veneer.injection.sites import WeightSite
from veneer.injection.towers import Tower, towers_of

from .._core.lora_config import ENCODERS
from .._io.reader import File
from .._names.kohya import NamedLayer, named_layers
from .._names.kohya import readable_layers as kohya_layers
from .._peft.tensors import default_component
from ..comfyui import ComfyUI

OWN = "lycoris_"  # LyCORIS' own wrapper, for any model
OFT = "oft_unet_"  # sd-scripts' own OFT, instead of `lora_unet_`
PREFIXES = ("lora_unet_", "lora_te", "diffusion_model.", "text_encoders.", OFT, OWN)


def readable_layers(model: Any, file: File, names: Collection[str]) -> dict[str, NamedLayer]:
    """The modules of a model or pipeline by every name that a file may use.

    Args:
        names: of the file's modules.
    Raises:
        LoadError: the names begin with `lycoris_`, which does not identify a component, and several components match.
    """
    towers = towers_of(model)
    known = {name: place for tower in towers for place in kohya_layers(tower) for name in place.names}
    known |= {OFT + name.removeprefix("lora_unet_"): p for name, p in known.items() if name.startswith("lora_unet_")}
    known |= ComfyUI().known(model)
    known |= {name: place for tower in towers for place in dotted_layers(tower) for name in place.names}
    wrapped = {name for name in names if name.startswith(OWN)}
    return known | (_of_one_tower(towers, file, wrapped) if wrapped else {})


def written_layers(tower: Tower, numbered: bool = False) -> Sequence[NamedLayer]:
    """The modules of a tower under the names that are written: kohya's if its tools support the model."""
    return named_layers(tower, numbered) or lycoris_layers(tower, slices=True)


def dotted_layers(tower: Tower) -> list[NamedLayer]:
    """diffusers' component and path of every module, such as `transformer.transformer_blocks.0.attn.to_q`, one weight each.

    Used by ai-toolkit and also read by ComfyUI; fused projections of the original release are several modules here.
    """
    found, component = [], tower.component or default_component(tower)
    for site in tower.sites if component else ():
        if isinstance(site, WeightSite) and site.kind != "embedding" and site.param == "weight" and site.rows is None:
            path = site.name.removeprefix(f"{tower.component}.") if tower.component else site.name
            inside = type(tower.module).__name__ in ENCODERS and not path.startswith(("text_model.", "text_projection"))
            found.append(NamedLayer((f"{component}.text_model.{path}" if inside else f"{component}.{path}",), (site,)))
    return found


def lycoris_layers(tower: Tower, slices: bool = False) -> list[NamedLayer]:
    """`lycoris_` and the path of every module.

    Args:
        slices: also lists a fused projection as its slices, if they cover the whole weight.
    """
    found: dict[str, list[WeightSite]] = {}
    for site in tower.sites:
        if isinstance(site, WeightSite) and site.kind != "embedding" and site.param == "weight" and site.path:
            found.setdefault(site.path, []).append(site)
    result = []
    for path, sites in found.items():
        names, whole = _spellings(tower, path), [s for s in sites if s.rows is None]
        parts = sorted((s for s in sites if s.rows is not None), key=lambda s: s.rows or ())
        result += [NamedLayer(names, (whole[0],))] if whole else []
        if parts and (slices or not whole) and _all_rows(tower, path, parts):
            result.append(NamedLayer(names, tuple(parts)))
    return result


def _all_rows(tower: Tower, path: str, parts: Sequence[WeightSite]) -> bool:
    weight: Any = tower.module.get_submodule(path).weight
    ends = [0, *(s.rows[1] for s in parts if s.rows)]
    return [s.rows for s in parts] == list(pairwise(ends)) and ends[-1] == len(weight)


def _spellings(tower: Tower, path: str) -> tuple[str, ...]:
    """Names with and without `text_model.`, which depends on the version of transformers."""
    paths = [path]
    if type(tower.module).__name__ in ENCODERS:
        paths.append(path.removeprefix("text_model.") if path.startswith("text_model.") else f"text_model.{path}")
    return tuple(OWN + p.replace(".", "_") for p in paths)


def _of_one_tower(towers: Sequence[Tower], file: File, names: set[str]) -> dict[str, NamedLayer]:
    """The modules of the tower that has all these names: the main tower, or the only match; if none matches, the main tower."""
    known = [(tower, {name: place for place in lycoris_layers(tower) for name in place.names}) for tower in towers]
    able = [(tower, found) for tower, found in known if names <= found.keys()]
    main = [found for tower, found in able if tower.main] or [found for _, found in able]
    if len(main) > 1:
        components = ", ".join(tower.component or "model" for tower, _ in able)
        raise LoadError(
            f"{file.path}: its names begin with '{OWN}', which does not identify a component, and {components} have modules of "
            "these names. Load it on the component it was made for, such as pipe.text_encoder.",
            file=file.path,
            where=OWN,
            given=tuple(tower.component or "model" for tower, _ in able),
            expected=1,
        )
    return main[0] if main else known[0][1]

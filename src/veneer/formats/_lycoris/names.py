"""Names of modules in LyCORIS' layout: those of kohya's, or `lycoris_` and the path in the model itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from veneer.injection import LoadError
from veneer.injection.sites import WeightSite
from veneer.injection.towers import Tower, towers_of

from .._core.lora_config import ENCODERS
from .._io.reader import File
from .._names.kohya import Place, places
from .._peft.tensors import usual
from ..comfyui import ComfyUI

OWN = "lycoris_"  # of LyCORIS' own wrapper, for a model of any kind
OFT = "oft_unet_"  # of sd-scripts' own OFT, in the place of `lora_unet_`
PREFIXES = ("lora_unet_", "lora_te", "diffusion_model.", "text_encoders.", OFT, OWN)


def readable(model: Any, file: File, names: Collection[str]) -> dict[str, Place]:
    """The modules of a model or pipeline by every name that a file may call them.

    Args:
        names: of the file's modules.
    Raises:
        LoadError: `lycoris_` names, which do not say what part of a pipeline they are of, and several have them.
    """
    towers = towers_of(model)
    known = {name: place for tower in towers for place in places(tower) for name in place.names}
    known |= {OFT + name.removeprefix("lora_unet_"): p for name, p in known.items() if name.startswith("lora_unet_")}
    known |= ComfyUI().known(model)
    known |= {name: place for tower in towers for place in dotted(tower) for name in place.names}
    wanted = {name for name in names if name.startswith(OWN)}
    return known | (_of_one_tower(towers, file, wanted) if wanted else {})


def written(tower: Tower, numbered: bool = False) -> Sequence[Place]:
    """The modules of a tower as they are written: as kohya's tools do where they know such a model."""
    return places(tower, numbered) or own(tower, slices=True)


def dotted(tower: Tower) -> list[Place]:
    """diffusers' component and path of every module, such as `transformer.transformer_blocks.0.attn.to_q`, one weight each.

    ai-toolkit's spelling, which ComfyUI reads too; a fused projection of the first release is several modules here.
    """
    found, component = [], tower.component or usual(tower)
    for site in tower.sites if component else ():
        if isinstance(site, WeightSite) and site.kind != "embedding" and site.param == "weight" and site.rows is None:
            path = site.name.removeprefix(f"{tower.component}.") if tower.component else site.name
            inside = type(tower.module).__name__ in ENCODERS and not path.startswith(("text_model.", "text_projection"))
            found.append(Place((f"{component}.text_model.{path}" if inside else f"{component}.{path}",), (site,)))
    return found


def own(tower: Tower, slices: bool = False) -> list[Place]:
    """`lycoris_` and the path of every module.

    Args:
        slices: the weight of a fused projection is also there as its slices together, if it is all of them.
    """
    found: dict[str, list[WeightSite]] = {}
    for site in tower.sites:
        if isinstance(site, WeightSite) and site.kind != "embedding" and site.param == "weight" and site.path:
            found.setdefault(site.path, []).append(site)
    result = []
    for path, sites in found.items():
        names, whole = _spelt(tower, path), [s for s in sites if s.rows is None]
        parts = sorted((s for s in sites if s.rows is not None), key=lambda s: s.rows or ())
        result += [Place(names, (whole[0],))] if whole else []
        if parts and (slices or not whole) and _all_rows(tower, path, parts):
            result.append(Place(names, tuple(parts)))
    return result


def _all_rows(tower: Tower, path: str, parts: Sequence[WeightSite]) -> bool:
    weight: Any = tower.module.get_submodule(path).weight
    ends = [0, *(s.rows[1] for s in parts if s.rows)]
    return [s.rows for s in parts] == list(pairwise(ends)) and ends[-1] == len(weight)


def _spelt(tower: Tower, path: str) -> tuple[str, ...]:
    """`text_model.` comes and goes with the version of transformers."""
    paths = [path]
    if type(tower.module).__name__ in ENCODERS:
        paths.append(path.removeprefix("text_model.") if path.startswith("text_model.") else f"text_model.{path}")
    return tuple(OWN + p.replace(".", "_") for p in paths)


def _of_one_tower(towers: Sequence[Tower], file: File, names: set[str]) -> dict[str, Place]:
    """The modules of the tower that has all these names: the main one, or the only one; else of the main one."""
    known = [(tower, {name: place for place in own(tower) for name in place.names}) for tower in towers]
    able = [(tower, found) for tower, found in known if names <= found.keys()]
    main = [found for tower, found in able if tower.main] or [found for _, found in able]
    if len(main) > 1:
        components = ", ".join(tower.component or "model" for tower, _ in able)
        raise LoadError(
            f"{file.path}: its names begin with '{OWN}', which does not say of what, and {components} have modules of these "
            "names. Load it on the part that it was made for, such as pipe.text_encoder.",
            file=file.path,
            where=OWN,
            given=tuple(tower.component or "model" for tower, _ in able),
            expected=1,
        )
    return main[0] if main else known[0][1]

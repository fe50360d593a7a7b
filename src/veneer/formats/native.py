"""veneer's native format: everything that training changed, and the information needed to attach it again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.attachment.fingerprint import identity
from veneer.injection.attachment.state_dict import replaced_tensors
from veneer.injection.towers import towers_of
from veneer.version import __version__

from ._core.attach import AttachmentSpec, attach_all, migrate_config, reject_merged
from ._core.component_map import ComponentMap, base_mismatch, quantization_remark
from ._core.format import Format, LayerInfo, Options, parameters_by_prefix
from ._io.composition_header import composition_entry, restore_composition
from ._io.header import first_duplicate
from ._io.reader import File
from ._io.writer import add_state, write

VERSION = 1
KEY = "veneer"


class Native(Format):
    """One safetensors file: tensors under `site-name:parameter`, tensors shared by several sites stored once, and a JSON header.

    Several attachments: tensors under `attachment/site-name:parameter`. The header, under the metadata key `veneer`:

        {"version": 1, "veneer": "0.1.0", "base": {component: {"class", "config", "fingerprint", "quantization" (if quantized),
                                                               "without": [names of tensors that are in the file]}},
         "attachments": [{"name", "method", "revision" (1 if absent), "config", "where", "train", "sites", "trained",
                          "shared": {tensor: tensor}}],
         "composition": tree of nodes over the attachments, if they run in one, "provenance": {…}}
    """

    name: ClassVar[str] = "native"
    file: ClassVar[str] = "adapter.safetensors"
    order: ClassVar[int] = 0

    def reads(self, file: File) -> bool:
        return KEY in file.metadata

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        names = [a.name for a in attachments]
        if not names:
            raise SaveError(f"{target}: no attachment to save.", file=target, given=0, expected=1)
        if len(set(names)) != len(names):
            name = max(names, key=names.count)
            message = f"{target}: two attachments are named '{name}'. Give them distinct names."
            raise SaveError(message, file=target, where=name, given=names.count(name), expected=1)
        tensors: dict[str, Tensor] = {}
        entries = [_entry(a, tensors, f"{a.name}/" if len(attachments) > 1 else "") for a in attachments]
        origin = {k: v for a in attachments for k, v in a.provenance.items()} if provenance is None else dict(provenance)
        header = {
            "version": VERSION,
            "veneer": __version__,
            "base": _bases(attachments),
            "attachments": entries,
            **composition_entry(attachments, target),
            "provenance": origin,
        }
        return write_header(target, tensors, header)

    def layers(self, file: File) -> list[LayerInfo]:
        entries = header_of(file)["attachments"]
        start = {entry["name"]: f"{entry['name']}/" if len(entries) > 1 else "" for entry in entries}
        stored = parameters_by_prefix(file, ":")
        return [_layer(file, entry, start[entry["name"]], name, stored) for entry in entries for name in _site_names(entry)]

    def words(self, file: File) -> list[str]:
        options = [entry["config"].get("tokens", ()) for entry in header_of(file)["attachments"]]
        lists = [[tokens] if isinstance(tokens, str) else tokens for tokens in options]
        return [word for tokens in lists if isinstance(tokens, (list, tuple)) for word in tokens if isinstance(word, str)]

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        header = header_of(file)
        move = ComponentMap.match(file, header["base"], {t.component: t.module for t in towers_of(model)})
        notes = list(_compare(file, header["base"], move, options))
        tensors = file.tensors(finite=options.strict, whole=("",))  # buffers may have an integer dtype
        several = len(header["attachments"]) > 1
        here = {site.name for tower in towers_of(model) for site in tower.sites}
        specs, used = [], set[str]()
        for entry in header["attachments"]:
            state, keys = state_of_entry(file, entry, tensors, f"{entry['name']}/" if several else "")
            used |= keys
            specs.append(_spec(file, entry, {move.name(k): t for k, t in state.items()}, move, here, options, header, notes))
        unused = [k for k in tensors if k not in used]
        if unused and options.strict:
            listing = f"{file.path}: unused {len(unused)}: {', '.join(unused[:8])}"
            message = f"{listing}. They belong to no attachment of the file. Pass strict=False to load the rest."
            raise LoadError(message, file=file.path, unused=unused)
        specs[0] = dataclasses.replace(specs[0], unused=unused)
        return restore_composition(model, file, header, attach_all(model, file, specs, options))


def _site_names(entry: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*entry["sites"], *entry["trained"]]))


def _layer(file: File, entry: Mapping[str, Any], prefix: str, name: str, stored: Mapping[str, int]) -> LayerInfo:
    """One site of an attachment; alpha is given if it does not depend on the site's role."""
    config, down = entry["config"], file.shapes.get(f"{prefix}{name}:down")
    rank = down[0] if down else config.get("rank")
    alphas = _alphas_by_site(config)
    own = alphas.get(f"name:{name}", config.get("alpha"))
    by_role = config.get("rslora") or any(not k.startswith("name:") for k in alphas)
    alpha = None if by_role or "alpha" not in config else rank if own is None else own
    typed = [value if type(value) in kinds else None for value, kinds in ((rank, (int,)), (alpha, (int, float)))]
    return LayerInfo(f"{prefix}{name}", entry["method"], typed[0], typed[1], stored.get(f"{prefix}{name}", 0))


def _alphas_by_site(config: Mapping[str, Any]) -> dict[str, Any]:
    """The alphas of `by_site`, and of the option `alphas` that LoRA had."""
    former, by_site = (value if isinstance(value := config.get(key), dict) else {} for key in ("alphas", "by_site"))
    return {**former, **{k: own["alpha"] for k, own in by_site.items() if isinstance(own, dict) and "alpha" in own}}


def _entry(attachment: Attachment, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Header entry of one attachment; adds its tensors to `tensors`."""
    shared = add_state(attachment.state_dict(), tensors, prefix)
    return {
        "name": attachment.name,
        "method": attachment.method.name,
        **({"revision": attachment.method.revision} if attachment.method.revision > 1 else {}),
        "config": attachment.method.config(),
        "where": list(attachment.where),
        "train": list(attachment.train),
        "sites": list(attachment.parts),
        "trained": list(dict.fromkeys(key.rpartition(":")[0] for key in attachment.extras)),
        "shared": shared,
    }


def write_header(target: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Writes a file. Raises `SaveError` for a header that is not JSON."""
    try:
        text = json.dumps(header, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        message = f"{target}: a config or the provenance holds a value that JSON cannot represent: {error}."
        raise SaveError(message, file=target, where="header", expected="JSON") from error
    return write(target, tensors, {KEY: text})


def _bases(attachments: Sequence[Attachment]) -> dict[str, Any]:
    """Identity of every adapted tower, without the tensors that the file stores itself."""
    towers: dict[str, nn.Module] = {}
    for attachment in attachments:
        for component, tower in attachment.towers.items():
            if towers.setdefault(component, tower) is not tower:
                message = f"'{attachment.name}' is on another model than the attachments before it. Save it separately."
                raise SaveError(message, where=attachment.name, given="on another model")
            reject_merged(tower, SaveError)
    without: dict[str, set[str]] = {c: set() for c in towers}
    for attachment in attachments:
        for component, path in attachment.extras.values():
            without[component].add(path)
        for component, path in replaced_tensors(attachment):
            without[component].add(path)
    return {c: {**identity(t, without[c]), "without": sorted(without[c])} for c, t in towers.items()}


def header_of(file: File) -> dict[str, Any]:
    """The JSON header of a file. Raises `LoadError` if it is incomplete or of a later version."""
    header = file.json(KEY)
    version = header.get("version") if isinstance(header, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise LoadError(
            f"{file.path}: has version {version} of the native format, written by veneer {header.get('veneer')}; the installed "
            f"veneer {__version__} supports up to version {VERSION}. Update veneer.",
            file=file.path,
            where="version",
            given=version,
            expected=VERSION,
        )
    if type(version) is not int or version != VERSION or not _is_complete(header):
        message = f"{file.path}: its 'veneer' header is incomplete (version {str(version)[:20]}). The file is corrupt."
        raise LoadError(message, file=file.path, where=KEY, expected=VERSION)
    _reject_ambiguous(file, header)
    return header


def _reject_ambiguous(file: File, header: Mapping[str, Any]) -> None:
    """Raises for duplicate attachment names, duplicate sites, and sites of no base."""
    again = first_duplicate(entry["name"] for entry in header["attachments"])
    if again is not None:
        message = f"{file.path}: two attachments are named '{again[:80]}'. The file is corrupt."
        raise LoadError(message, file=file.path, where=again[:80], given=2, expected=1)
    for entry in header["attachments"]:
        places = [*entry["sites"], *entry["trained"]]
        again = first_duplicate(places)
        if again is not None:
            message = f"{file.path}: '{again[:80]}' is listed twice. The file is corrupt."
            raise LoadError(message, file=file.path, where=again[:80], given=2, expected=1)
        starts = tuple(f"{component}." if component else "" for component in header["base"])
        away = next((place for place in places if not place.startswith(starts)), None)
        if away is not None or not starts:
            message = f"{file.path}: the header has no base for the site '{str(away)[:80]}'. The file is corrupt."
            raise LoadError(message, file=file.path, where=str(away)[:80], expected="base")


def _is_complete(header: Mapping[str, Any]) -> bool:
    entries, base, provenance = header.get("attachments"), header.get("base"), header.get("provenance")
    kinds: dict[str, type] = {"name": str, "method": str, "config": dict, "shared": dict}
    kinds |= dict.fromkeys(("where", "train", "sites", "trained"), list)
    return (
        isinstance(base, dict)
        and isinstance(provenance, dict)
        and all(isinstance(b, dict) and isinstance(b.get("without"), list) for b in base.values())
        and isinstance(entries, list)
        and bool(entries)
        and all(isinstance(e, dict) and all(isinstance(e.get(k), kind) for k, kind in kinds.items()) for e in entries)
        and all(isinstance(n, str) for e in entries for k in ("where", "train", "sites", "trained") for n in e[k])
        and all(isinstance(n, str) for e in entries for n in e["shared"].values())
        and all(type(e.get("revision", 1)) is int and e.get("revision", 1) > 0 for e in entries)
        and all(isinstance(n, str) for b in base.values() for n in b["without"])
    )


def _compare(file: File, bases: Mapping[str, Any], move: ComponentMap, options: Options) -> Iterator[str]:
    """Raises if a tower differs from the one the adapter was trained on; yields remarks if this cannot be checked."""
    for component, saved in bases.items():
        tower = move.towers[component]
        reject_merged(tower, LoadError)
        if not options.same_base:
            yield f"'{component}' was not compared with the base it was trained on (base='any')"
            continue
        found = identity(tower, saved["without"])
        yield from quantization_remark(component, saved, found)
        known = [k for k in ("class", "config") if found[k] is not None and saved.get(k) is not None]
        differs = [k for k in known if found[k] != saved[k]]
        if not differs and None in (found["fingerprint"], saved.get("fingerprint")):
            yield f"the base '{component}' was not compared: its weights were quantized by another tool, or are not loaded"
        elif differs or found["fingerprint"] != saved.get("fingerprint"):
            raise base_mismatch(file, component, saved, found)


def state_of_entry(
    file: File, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of one attachment by their own names, and their keys in the file."""
    own = {key[len(prefix) :]: key for key in tensors if key.startswith(prefix)}
    lost = [key for key, place in entry["shared"].items() if place not in tensors]
    if lost:
        message = f"{file.path}: '{lost[0]}' refers to a shared tensor that is missing. The file is corrupt."
        raise LoadError(message, file=file.path, where=lost[0], missing=[entry["shared"][lost[0]]])
    keys = {**own, **entry["shared"]}
    return {name: tensors[key] for name, key in keys.items()}, set(keys.values())


def _spec(
    file: File,
    entry: Mapping[str, Any],
    state: Mapping[str, Tensor],
    move: ComponentMap,
    here: set[str],
    options: Options,
    header: Mapping[str, Any],
    notes: Sequence[str],
) -> AttachmentSpec:
    sites, trained = ([move.name(n) for n in entry[k]] for k in ("sites", "trained"))
    away = [n for n in [*sites, *trained] if n not in here]
    if away and (options.strict or len(away) == len(sites) + len(trained)):
        raise LoadError(
            f"{file.path}: '{entry['name']}' ({entry['method']}) needs {len(away)} sites that the model does not have: "
            f"{', '.join(away[:8])}. It was made for another model, or the model was fused or modified since.",
            file=file.path,
            where=entry["name"],
            missing=away,
        )
    return AttachmentSpec(
        name=entry["name"],
        method=entry["method"],
        config=migrate_config(file, entry, move.config(entry["config"]), state),
        sites=[n for n in sites if n in here],
        train=[n for n in trained if n in here],
        state=state,
        where=entry["where"] if move.is_identity else None,
        trained=entry["train"] if move.is_identity else None,
        notes=[*notes, *([f"{len(away)} sites are not in the model: {', '.join(away[:8])}"] if away else [])],
        provenance=header["provenance"],
    )


save = Native().save

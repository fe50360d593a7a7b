"""veneer's own format: everything that training changed, and what is needed to put it back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer import __version__
from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.attachment.fingerprint import identity
from veneer.injection.attachment.state_dict import held_whole
from veneer.injection.towers import towers_of

from ._core.attach import Wanted, attach_all, migrated, refuse_merged
from ._core.component_map import Move, other_base
from ._core.format import Format, Layer, Options, listed, sizes
from ._io.header import twice
from ._io.reader import File
from ._io.writer import destination, write

VERSION = 1
KEY = "veneer"


class Native(Format):
    """One safetensors file: tensors under `site-name:parameter`, tensors that several sites share once, and a JSON header.

    Several attachments: tensors under `attachment/site-name:parameter`. The header, under the metadata key `veneer`:

        {"version": 1, "veneer": "0.1.0",
         "base": {component: {"class", "config", "fingerprint", "without": [names of tensors that are in the file]}},
         "attachments": [{"name", "method", "revision" (1 if absent), "config", "where", "train", "sites", "trained",
                          "shared": {tensor: tensor}}],
         "provenance": {…}}
    """

    name: ClassVar[str] = "native"
    file: ClassVar[str] = "adapter.safetensors"
    order: ClassVar[int] = 0

    def reads(self, file: File) -> bool:
        return KEY in file.metadata

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        several = listed(attachments)
        target = destination(path, self.file)
        names = [a.name for a in several]
        if not names:
            raise SaveError(f"{target}: there is no attachment to save.", file=target, given=0, expected=1)
        if len(set(names)) != len(names):
            name = max(names, key=names.count)
            message = f"{target}: two attachments are called '{name}'; give them other names."
            raise SaveError(message, file=target, where=name, given=names.count(name), expected=1)
        tensors: dict[str, Tensor] = {}
        entries = [_entry(a, tensors, f"{a.name}/" if len(several) > 1 else "") for a in several]
        header = {
            "version": VERSION,
            "veneer": __version__,
            "base": _bases(several),
            "attachments": entries,
            "provenance": dict(provenance)
            if provenance is not None
            else {k: v for a in several for k, v in a.provenance.items()},
        }
        try:
            text = json.dumps(header, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            message = f"{target}: a config or the provenance holds something that JSON has no word for: {error}."
            raise SaveError(message, file=target, where="header", expected="JSON") from error
        return write(target, tensors, {KEY: text})

    def layers(self, file: File) -> list[Layer]:
        entries = _header(file)["attachments"]
        start = {entry["name"]: f"{entry['name']}/" if len(entries) > 1 else "" for entry in entries}
        stored = sizes(file, ":")
        return [_layer(file, entry, start[entry["name"]], name, stored) for entry in entries for name in _places(entry)]

    def words(self, file: File) -> list[str]:
        given = [entry["config"].get("tokens", ()) for entry in _header(file)["attachments"]]
        listed = [[tokens] if isinstance(tokens, str) else tokens for tokens in given]
        return [word for tokens in listed if isinstance(tokens, (list, tuple)) for word in tokens if isinstance(word, str)]

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        header = _header(file)
        move = Move.of(file, header["base"], {t.component: t.module for t in towers_of(model)})
        notes = list(_compare(file, header["base"], move, options))
        tensors = file.tensors(finite=options.strict, whole=("",))  # statistics are counted in whole numbers
        several = len(header["attachments"]) > 1
        here = {site.name for tower in towers_of(model) for site in tower.sites}
        wanted, used = [], set[str]()
        for entry in header["attachments"]:
            state, keys = _state(file, entry, tensors, f"{entry['name']}/" if several else "")
            used |= keys
            wanted.append(_wanted(file, entry, {move.name(k): t for k, t in state.items()}, move, here, options, header, notes))
        unused = [k for k in tensors if k not in used]
        if unused and options.strict:
            raise LoadError(
                f"{file.path}: unused {len(unused)}: {', '.join(unused[:8])}. They belong to no attachment of the file. "
                "Pass strict=False to load the rest.",
                file=file.path,
                unused=unused,
            )
        wanted[0] = dataclasses.replace(wanted[0], unused=unused)
        return attach_all(model, file, wanted, options)


def _places(entry: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*entry["sites"], *entry["trained"]]))


def _layer(file: File, entry: Mapping[str, Any], prefix: str, name: str, stored: Mapping[str, int]) -> Layer:
    """One site of an attachment; alpha is told where it does not depend on the site's role."""
    config, down = entry["config"], file.shapes.get(f"{prefix}{name}:down")
    rank = down[0] if down else config.get("rank")
    alphas = config.get("alphas") if isinstance(config.get("alphas"), dict) else {}
    own = alphas.get(f"name:{name}", config.get("alpha"))
    by_role = config.get("rslora") or any(not k.startswith("name:") for k in alphas)
    alpha = None if by_role or "alpha" not in config else own or rank
    told = [value if type(value) in kinds else None for value, kinds in ((rank, (int,)), (alpha, (int, float)))]
    return Layer(f"{prefix}{name}", entry["method"], told[0], told[1], stored.get(f"{prefix}{name}", 0))


def _entry(attachment: Attachment, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Header entry of one attachment; its tensors go into `tensors`."""
    first = {_storage(t): key for key, t in tensors.items() if t.numel()}
    shared: dict[str, str] = {}
    for key, tensor in attachment.state_dict().items():
        place = _storage(tensor)
        if tensor.numel() and not tensor.is_meta and place in first:
            shared[key] = first[place]
        else:
            first[place] = prefix + key
            tensors[prefix + key] = tensor
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


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), str(tensor.device), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _bases(attachments: Sequence[Attachment]) -> dict[str, Any]:
    """Identity of every tower that is touched, without the tensors that the file carries itself."""
    towers: dict[str, nn.Module] = {}
    for attachment in attachments:
        for component, tower in attachment.towers.items():
            if towers.setdefault(component, tower) is not tower:
                message = f"'{attachment.name}' is on another model than the attachments before it; save it by itself."
                raise SaveError(message, where=attachment.name, given="on another model")
            refuse_merged(tower, SaveError)
    without: dict[str, set[str]] = {c: set() for c in towers}
    for attachment in attachments:
        for component, path in attachment.extras.values():
            without[component].add(path)
        for component, path in held_whole(attachment):
            without[component].add(path)
    return {c: {**identity(t, without[c]), "without": sorted(without[c])} for c, t in towers.items()}


def _header(file: File) -> dict[str, Any]:
    header = file.json(KEY)
    version = header.get("version") if isinstance(header, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise LoadError(
            f"{file.path}: written in version {version} of the format, by veneer {header.get('veneer')}; this veneer "
            f"{__version__} reads up to version {VERSION}. Update veneer.",
            file=file.path,
            where="version",
            given=version,
            expected=VERSION,
        )
    if type(version) is not int or version != VERSION or not _complete(header):
        message = f"{file.path}: its 'veneer' header is incomplete (version {str(version)[:20]}). The file is damaged."
        raise LoadError(message, file=file.path, where=KEY, expected=VERSION)
    _refuse_doubtful(file, header)
    return header


def _refuse_doubtful(file: File, header: Mapping[str, Any]) -> None:
    """Raise for two attachments of one name or a site named twice, whose tensors would count twice, and for sites of no base."""
    again = twice(entry["name"] for entry in header["attachments"])
    if again is not None:
        message = f"{file.path}: two attachments are called '{again[:80]}'. The file is damaged."
        raise LoadError(message, file=file.path, where=again[:80], given=2, expected=1)
    for entry in header["attachments"]:
        places = [*entry["sites"], *entry["trained"]]
        again = twice(places)
        if again is not None:
            message = f"{file.path}: '{again[:80]}' is named twice. The file is damaged."
            raise LoadError(message, file=file.path, where=again[:80], given=2, expected=1)
        starts = tuple(f"{component}." if component else "" for component in header["base"])
        away = next((place for place in places if not place.startswith(starts)), None)
        if away is not None or not starts:
            message = f"{file.path}: the header names no base for the site '{str(away)[:80]}'. The file is damaged."
            raise LoadError(message, file=file.path, where=str(away)[:80], expected="base")


def _complete(header: Mapping[str, Any]) -> bool:
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


def _compare(file: File, bases: Mapping[str, Any], move: Move, options: Options) -> Iterator[str]:
    """Raise if a tower is another than the adapter was trained on; remarks where that cannot be told."""
    for component, saved in bases.items():
        tower = move.towers[component]
        refuse_merged(tower, LoadError)
        if not options.same_base:
            yield f"'{component}' was not compared to the one that it was trained on (base='any')"
            continue
        found = identity(tower, saved["without"])
        differs = [k for k in ("class", "config") if found[k] != saved.get(k)]
        if not differs and None in (found["fingerprint"], saved.get("fingerprint")):
            yield f"the base '{component}' was not compared: its weights are quantised or not there"
        elif differs or found["fingerprint"] != saved.get("fingerprint"):
            raise other_base(file, component, saved, found)


def _state(
    file: File, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of one attachment by their own names, and their keys in the file."""
    own = {key[len(prefix) :]: key for key in tensors if key.startswith(prefix)}
    lost = [key for key, place in entry["shared"].items() if place not in tensors]
    if lost:
        message = f"{file.path}: the header says that '{lost[0]}' is shared, and what it shares is not there. It is damaged."
        raise LoadError(message, file=file.path, where=lost[0], missing=[entry["shared"][lost[0]]])
    keys = {**own, **entry["shared"]}
    return {name: tensors[key] for name, key in keys.items()}, set(keys.values())


def _wanted(
    file: File,
    entry: Mapping[str, Any],
    state: Mapping[str, Tensor],
    move: Move,
    here: set[str],
    options: Options,
    header: Mapping[str, Any],
    notes: Sequence[str],
) -> Wanted:
    sites, trained = ([move.name(n) for n in entry[k]] for k in ("sites", "trained"))
    away = [n for n in [*sites, *trained] if n not in here]
    if away and (options.strict or len(away) == len(sites) + len(trained)):
        raise LoadError(
            f"{file.path}: '{entry['name']}' ({entry['method']}) needs {len(away)} sites that the model does not have: "
            f"{', '.join(away[:8])}. It was made for another model, or the model was fused or changed since.",
            file=file.path,
            where=entry["name"],
            missing=away,
        )
    return Wanted(
        name=entry["name"],
        method=entry["method"],
        config=migrated(file, entry, move.config(entry["config"]), state),
        sites=[n for n in sites if n in here],
        train=[n for n in trained if n in here],
        state=state,
        where=entry["where"] if move.trivial else None,
        trained=entry["train"] if move.trivial else None,
        notes=[*notes, *([f"{len(away)} sites are not in the model: {', '.join(away[:8])}"] if away else [])],
        provenance=header["provenance"],
    )


save = Native().save

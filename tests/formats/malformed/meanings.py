"""Reference reading of each format: names of layers and configs, without veneer."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.formats.malformed.bytes_read import Array, Bytes, Malformed, parsed, require
from tests.formats.malformed.equations import changed, loha, lora

Files = Mapping[str, bytes]
Meaning = dict[str, Array]  # `component/path.param` to W' − W, or a name of something else to its new value
ENDS = {
    end: end for end in (
        "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "oft_blocks", "rescale",
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "on_input", "weight",
        "a1.weight", "a2.weight", "b1.weight", "b2.weight",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )
}  # fmt: skip
KOHYA = {end: end for end in ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha")}
AB = {**KOHYA, "lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
HALVES = {"down.weight": "lora_down.weight", "up.weight": "lora_up.weight"}
NUMBERS = ("alpha", "on_input")


@dataclass(frozen=True)
class Base:
    """Arrays of a model: `weights` by key, names of `layers` of a format to the keys of their rows, widths of vocabularies."""

    weights: Mapping[str, Array]
    layers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    swapped: frozenset[str] = frozenset()
    widths: Mapping[str, int] = field(default_factory=dict)


def grouped(file: Bytes, ends: Mapping[str, str], layers: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    found: dict[str, dict[str, Array]] = {}
    for key in file.arrays:
        fitting = [end for end in ends if key.endswith("." + end) and key[: -len(end) - 1] in layers]
        require(fitting, f"{key} is of nothing")
        end = max(fitting, key=len)
        parts = found.setdefault(key[: -len(end) - 1], {})
        require(ends[end] not in parts, f"{key} is there twice")
        parts[ends[end]] = file.arrays[key] if ends[end] in NUMBERS else file.weight(key)
    return found


def layered(file: Bytes, base: Base, ends: Mapping[str, str]) -> Meaning:
    """Formats that name layers and the parts of a layer."""
    found: Meaning = {}
    for name, parts in grouped(file, ends, base.layers).items():
        keys = base.layers[name]
        weight = np.concatenate([base.weights[key] for key in keys])
        change = changed(parts, np.roll(weight, len(weight) // 2, 0) if name in base.swapped else weight)
        change = np.roll(change, len(weight) // 2, 0) if name in base.swapped else change
        start = 0
        for key in keys:
            stop = start + len(base.weights[key])
            require(key not in found, f"{key} is changed twice")
            found[key] = change[start:stop]
            start = stop
    return found


def by_ends(ends: Mapping[str, str]) -> Callable[[Files, Base], Meaning]:
    return lambda files, base: layered(Bytes(next(iter(files.values()))), base, ends)


def words(tokens: Sequence[str], rows: Array, base: Base) -> Meaning:
    """Vectors by their tokens, for the only vocabulary."""
    ((site, width),) = base.widths.items()
    require(rows.ndim == 2 and rows.shape[1] == width and len(rows) and tokens and len(rows) % len(tokens) == 0, "vectors")
    require(len(set(tokens)) == len(tokens) and all(isinstance(t, str) and t.split() == [t] for t in tokens), "tokens")
    return {f"{' '.join(tokens)} {site}:vectors": rows}


def two(rows: Array) -> Array:
    return rows[None] if rows.ndim == 1 else rows


def told(method: str, **options: Any) -> Meaning:
    """Options of a method as numbers."""
    values = {name: [*value.encode()] if isinstance(value, str) else value for name, value in options.items()}
    return {f"{method}.{name}": np.array(value, np.float64) for name, value in values.items()}


def embeddings(files: Files, base: Base) -> Meaning:
    file = Bytes(next(iter(files.values())))
    arrays = {key: two(file.weight(key)) for key in file.arrays}
    require(arrays and all(a.ndim == 2 for a in arrays.values()), "vectors")
    if set(arrays) & {"clip_l", "clip_g", "t5", "t5xxl", "emb_params"}:
        require(len(arrays) == 1 and not set(arrays) & {"t5", "t5xxl"}, "one encoder")
        name = next(iter(files)).rpartition(".")[0].lower()
        told = parsed(file.metadata["tokens"], False) if "tokens" in file.metadata else [f"<{name}>"]
        require(isinstance(told, list), "tokens")
        return words(told, next(iter(arrays.values())), base)
    require(len({len(a) for a in arrays.values()}) == 1 and len({a.shape[1] for a in arrays.values()}) == 1, "vectors")
    order: Any = parsed(file.metadata["tokens"], False) if "tokens" in file.metadata else None
    listed = isinstance(order, list) and all(isinstance(t, str) for t in order) and sorted(order) == sorted(arrays)
    tokens = order if listed else list(arrays)
    return words(tokens, np.concatenate([arrays[t] for t in tokens]), base)


def onetrainer(files: Files, base: Base) -> Meaning:
    file = Bytes(next(iter(files.values())))
    found: Meaning = {}
    for key in [key for key in file.arrays if key.startswith("bundle_emb.")]:
        word, _, encoder = key.removeprefix("bundle_emb.").rpartition(".")
        require(word and encoder == "clip_l", "a word")
        found |= words([word], two(file.weight(key)), base)
        del file.arrays[key]
    return {**found, **layered(file, base, KOHYA)}


def cloneofsimo(files: Files, base: Base) -> Meaning:
    file, found = Bytes(next(iter(files.values()))), Meaning()
    tokens = sorted(key for key in file.arrays if file.metadata.get(key) == "<embed>")
    if tokens:
        rows = [two(file.weight(key)) for key in tokens]
        require(len({r.shape for r in rows}) == 1, "tokens")
        found = words(tokens, np.concatenate(rows), base)
    pairs = {key: file.weight(key) for key in file.arrays if key not in tokens}
    numbers = range(len(base.layers))
    require(not pairs or pairs.keys() == {f"text_encoder:{i}:{half}" for i in numbers for half in ("up", "down")}, "layers")
    for i, (key,) in enumerate(base.layers.values()) if pairs else ():
        down, up = (pairs[f"text_encoder:{i}:{half}"] for half in ("down", "up"))
        found[key] = lora(down, up, lambda rank: 1.0, base.weights[key])
    return found


def picture(files: Files, base: Base) -> Meaning:
    """A1111's token embedding in a text chunk of a PNG."""
    data = next(iter(files.values()))
    require(data.startswith(b"\x89PNG\r\n\x1a\n"), "a PNG")
    at, text = 8, None
    while at + 8 <= len(data) and text is None:
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        require(at + 12 + length <= len(data), "cut short")
        chunk = data[at + 8 : at + 8 + length]
        key, _, rest = chunk.partition(b"\0")
        if kind in (b"tEXt", b"zTXt") and key == b"sd-ti-embedding":
            text = zlib.decompress(rest[1:]) if kind == b"zTXt" else rest
        at += 12 + length
    require(text is not None, "no word")
    try:
        found = parsed(base64.b64decode(text or b"", validate=True).decode())
    except ValueError as error:
        raise Malformed(str(error)) from error
    rows = next(iter(found["string_to_param"].values()))["TORCHTENSOR"]
    array = np.array(rows, np.float64)
    require(np.isfinite(array).all() and all(type(n) in (int, float) for n in np.array(rows, object).flatten()), "numbers")
    token = str(found.get("name") or f"<{next(iter(files)).rpartition('.')[0]}>").lower()
    return words([token], two(array.astype(np.float32).astype(np.float64)), base)


def native(files: Files, base: Base) -> Meaning:
    """veneer's own: lora, loha, vera, textual_inversion, and trained base parameters."""
    file = Bytes(next(iter(files.values())))
    header = parsed(file.metadata["veneer"], False)
    require(isinstance(header, dict) and header.get("version") == 1 and header["attachments"], "a header")
    entries, found, used = header["attachments"], Meaning(), set[str]()
    require(len({e["name"] for e in entries}) == len(entries), "a name twice")
    for entry in entries:
        prefix = f"{entry['name']}/" if len(entries) > 1 else ""
        for site in [*entry["sites"], *entry["trained"]]:
            start = f"{prefix}{site}:"
            own = {key.removeprefix(start): key for key in file.arrays if key.startswith(start)}
            own |= {k.removeprefix(f"{site}:"): v for k, v in entry["shared"].items() if k.startswith(f"{site}:")}
            used |= set(own.values())
            parts = {name: file.weight(key) for name, key in own.items()}
            for key, change in _site(entry, site, parts, base, site in entry["trained"]).items():
                found[key] = found[key] + change if key in found else change
    require(used == set(file.arrays), "tensors left")
    return found


def _site(entry: dict[str, Any], site: str, parts: dict[str, Array], base: Base, trained: bool) -> Meaning:
    config, method = {**entry["config"], **(entry["config"].get("by_site") or {}).get(f"name:{site}", {})}, entry["method"]
    if trained:
        return {f"{site}:{name}": value for name, value in parts.items()}
    if method == "textual_inversion":
        require(site in base.widths, "a vocabulary")
        return words([config["tokens"]] if isinstance(config["tokens"], str) else config["tokens"], parts["vectors"], base)
    (key,) = base.layers[site]
    weight = base.weights[key]
    try:
        if method == "vera":
            a, b = parts["shared.A"][:, : weight.shape[1]], parts["shared.B"][: len(weight)]
            return {key: parts["b"][:, None] * (b @ (parts["d"][:, None] * a))}
        plain = config["alpha"]

        def scale(rank: int) -> float:
            require(plain is None or np.isfinite(plain), "alpha")
            return (rank if plain is None else plain) / (rank**0.5 if config.get("rslora") else rank)

        if method == "lora" and site == "table":  # rows of an embedding are its inputs
            down, up = parts["down"], parts["up"]
            require(down.ndim == up.ndim == 2 and down.shape[1] == up.shape[1], "a pair")
            return {key: scale(down.shape[1]) * (down @ up.T)}
        if method == "lora":
            return {key: lora(parts["down"], parts["up"], scale, weight)}
        require(method == "loha", "a method")
        names = {"up1": "hada_w1_a", "down1": "hada_w1_b", "up2": "hada_w2_a", "down2": "hada_w2_b"}
        flat = {names[name]: value.reshape(len(value), -1) for name, value in parts.items()}
        return {key: loha(flat, scale, weight)}
    except KeyError as error:
        raise Malformed(repr(error)) from error

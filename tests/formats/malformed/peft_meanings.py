"""Reference reading of files with peft's names and configs, without veneer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.formats.malformed.bytes_read import Array, Bytes, Malformed, parsed, require
from tests.formats.malformed.equations import blocks, cayley, dora, loha, lokr, lora, neumann, skew
from tests.formats.malformed.meanings import ENDS, Base, Files, Meaning, grouped


def of(config: Mapping[str, Any], path: str, key: str, patterns: str, default: Any) -> float:
    matching = (v for p, v in (config.get(patterns) or {}).items() if re.match(rf"(.*\.)?({p})$", path))
    value = next(matching, config.get(key, default))
    require(type(value) in (int, float) and np.isfinite(value), key)
    return float(value)


def diffusers(files: Files, base: Base) -> Meaning:
    file, found = Bytes(next(iter(files.values()))), {}
    config = parsed(file.metadata["lora_adapter_metadata"], False) if "lora_adapter_metadata" in file.metadata else None
    require(config is None or isinstance(config, dict), "metadata")
    for key in list(file.arrays):  # an adapter's name in it, or peft's own prefix
        inside = key.removeprefix("base_model.model.")
        if (plain := re.sub(r"(lora_(?:[AB]|magnitude_vector))\.(?!weight$)[^.]+", r"\1", inside)) != key:
            require(plain not in file.arrays, f"{plain} is there twice")
            file.arrays[plain], file.kinds[plain] = file.arrays.pop(key), file.kinds[key]
    prefix, own = "text_encoder.", None
    if config is not None:
        prefixed = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        own = prefixed or {k: v for k, v in config.items() if "." not in k}
    ends = {end: end for end in ("lora_A.weight", "lora_B.weight", "alpha")}
    ends |= {f"lora_magnitude_vector{end}": "lora_magnitude_vector" for end in ("", ".weight")}
    for name, parts in grouped(file, ends, base.layers).items():
        (key,) = base.layers[name]
        path = key.partition("/")[2].removesuffix(".weight")
        require({"lora_A.weight", "lora_B.weight"} <= parts.keys(), "no pair")
        require(key not in found, "a layer twice")

        def scale(rank: int, path: str = path, parts: dict[str, Array] = parts) -> float:
            if "alpha" in parts:
                require(parts["alpha"].size == 1, "alpha")
                return float(parts["alpha"].flatten()[0]) / rank
            if own is None:
                return 1.0
            require(own, "a config of the component")
            alpha = of(own, path, "lora_alpha", "alpha_pattern", 8)
            return alpha / (rank**0.5 if own.get("use_rslora") else rank)

        found[key] = lora(parts["lora_A.weight"], parts["lora_B.weight"], scale, base.weights[key])
        if "lora_magnitude_vector" in parts:
            found[key] = dora(found[key], parts["lora_magnitude_vector"], base.weights[key])
    return found


def peft(files: Files, base: Base) -> Meaning:
    file, config = Bytes(files["adapter_model.safetensors"]), parsed(files["adapter_config.json"], False)
    require(isinstance(config, dict), "a config")
    kind = config.get("peft_type")
    ends = {end: end for end in PEFT[kind]} if kind in PEFT else {}
    shared = {
        key: file.weight(key) for key in list(file.arrays) if kind == "VERA" and key in ("base_model.vera_A", "base_model.vera_B")
    }
    for key in shared:
        del file.arrays[key]
    levels = ("", "text_model.")  # which comes and goes with the version of transformers
    layers = {f"base_model.model.{level}{path}": path for path in base.layers for level in levels}
    found: Meaning = {}
    for name, parts in grouped(file, ends, layers).items():
        path = layers[name]
        (key,) = base.layers[path]
        require(key not in found, "a layer twice")
        found |= _module(kind, parts, shared, config, path, key, base)
    return found


PEFT = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"),
    "LOHA": [e for e in ENDS if e.startswith("hada")], "LOKR": [e for e in ENDS if e.startswith("lokr")],
    "OFT": ("oft_R.weight", "oft_R"), "BOFT": ("boft_R", "boft_s"), "IA3": ("ia3_l",),
    "VERA": ("vera_lambda_b", "vera_lambda_d"), "GLORA": [f"glora_{t}.{x}" for t in "ABDE" for x in ("Xd", "Xu", "X")],
}  # fmt: skip


def _module(
    kind: str, parts: dict[str, Array], shared: dict[str, Array], config: dict[str, Any], path: str, key: str, base: Base
) -> Meaning:
    weight = base.weights[key]

    def scale(rank: int) -> float:
        name = "lora_alpha" if kind == "LORA" else "alpha"
        alpha = of(config, path, name, "alpha_pattern", 8)
        return alpha / (rank**0.5 if kind == "LORA" and config.get("use_rslora") else rank)

    try:
        if kind == "LORA" and "lora_embedding_A" in parts:
            a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
            require(a.ndim == b.ndim == 2 and len(a) == b.shape[1], "a pair")
            return {key: scale(len(a)) * (b @ a).T}
        if kind == "LORA":
            change = lora(parts["lora_A.weight"], parts["lora_B.weight"], scale, weight)
            magnitude = parts.get("lora_magnitude_vector")
            require((magnitude is not None) or not config.get("use_dora"), "no magnitudes")
            if magnitude is None:
                return {key: change}
            require(magnitude.size == len(weight), "magnitudes")
            return {key: dora(change, magnitude.reshape(-1), weight)}
        if kind == "LOHA":
            return {key: loha(parts, scale, weight)}
        if kind == "LOKR":
            rank = of(config, path, "r", "rank_pattern", 8)
            return {key: lokr(parts, lambda _: of(config, path, "alpha", "alpha_pattern", 8) / rank, weight)}
        if kind == "OFT":
            (given,) = parts.values()
            side = weight.shape[1] // len(given)
            q = [skew(entries, side) for entries in given]
            if config.get("coft"):
                most = config["eps"] / len(q) ** 0.5
                q = [x * min(1, most / max(np.linalg.norm(x), 1e-30)) for x in q]
            if config.get("use_cayley_neumann"):
                count = config.get("num_cayley_neumann_terms", 5)
                require(isinstance(count, int) and 0 < count < 1000, "terms")
                return {key: weight @ blocks([neumann(x, count) for x in q]).T - weight}
            return {key: weight @ blocks([cayley(-x) for x in q]).T - weight}
        if kind == "BOFT":
            (given,) = parts["boft_R"]
            after = weight @ blocks([cayley(-(x - x.T) / 2) for x in given]).T
            lengths = parts.get("boft_s", np.ones(len(weight)))
            return {key: lengths.reshape(-1, 1) * after - weight}
        if kind == "IA3":
            inputs = any(path.endswith(end) for end in config["feedforward_modules"])
            return {key: weight * (parts["ia3_l"].reshape(1, -1) if inputs else parts["ia3_l"].reshape(-1, 1)) - weight}
        if kind == "VERA":
            a, b = shared["base_model.vera_A"][:, : weight.shape[1]], shared["base_model.vera_B"][: len(weight)]
            return {key: parts["vera_lambda_b"][:, None] * (b @ (parts["vera_lambda_d"][:, None] * a))}
        terms = {}
        for t in "ABDE":
            up, down = parts.get(f"glora_{t}.Xd"), parts.get(f"glora_{t}.Xu")
            terms[t] = parts.get(f"glora_{t}.X", np.zeros(1)) if up is None else up @ down
        bias = key.removesuffix("weight") + "bias"
        found = {key: weight * terms["A"] + terms["B"]}
        added = (base.weights[bias] * terms["D"].flatten() + terms["E"].flatten()) if bias in base.weights else None
        return found if added is None else {**found, bias: added}
    except (KeyError, ValueError) as error:
        raise Malformed(repr(error)) from error

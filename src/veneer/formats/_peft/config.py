"""peft's `adapter_config.json`: per-layer values, and the entries that veneer cannot reproduce."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.injection import LoadError

from .._io.reader import File, read_json

NAME = "adapter_config.json"
LARGEST = 2_000_000  # bytes
MOST, MOST_REPEATING, LONGEST = 4_096, 16, 1_000  # patterns in a config, patterns with repetitions, characters of one
REPEATED = re.compile(r"(?<!\\)[*+]")
# literals and character classes, optionally repeated, and unrepeated groups: nested repetition can take exponential time
PATTERN = re.compile(r"(?:(?:\\[.dwsb\-]|\[[\w\-]+\]|[\w.^$|:/\- ])(?:[*+?]\??)?|\((?:\?:)?|\))*")
# config entries that mean that the tensors alone are not the complete adapter
UNSUPPORTED = {
    "bias": "trained base biases", "lora_bias": "biases in its factors", "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens", "target_parameters": "adapted parameters of other modules",
    "alora_invocation_tokens": "an adapter activated by a token", "use_qalora": "pooled inputs", "arrow_config": "routing",
    "use_bdlora": "block-diagonal factors", "kasa_config": "a truncated base", "monteclora_config": "sampled factors",
    "velora_config": "compressed activations", "megatron_config": "sharded layers",
}  # fmt: skip
LARGEST_NUMBER = 1e30
DEFAULT_ALPHA = 8.0  # peft's default
BASE_CHANGING_INITS = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
    "orthogonal",
)  # initializations that change the base weights


def read_config(file: File) -> dict[str, Any]:
    """The config beside a file.

    Raises:
        LoadError: it is missing, or not a JSON object with a peft_type.
    """
    path = file.path.with_name(NAME)
    if not path.is_file():
        message = f"{file.path}: no {NAME} beside it, which holds its alpha. Copy the whole folder."
        raise LoadError(message, file=file.path, missing=[NAME])
    config = read_json(path, LARGEST)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise LoadError(f"{path}: has no peft_type, so it is not a peft config.", file=path, option="peft_type")
    return config


def reject_unsupported(where: Path, config: Mapping[str, Any]) -> None:
    """Raises for entries that the tensors do not include, or that no method in veneer implements.

    Args:
        where: the file of the config.
    Raises:
        LoadError: names the entry.
    """
    prefix = f"{where}: {config.get('peft_type', 'LORA')} with"
    start = str(config.get("init_lora_weights") or config.get("init_weights") or "")
    if start.lower().startswith(BASE_CHANGING_INITS):
        raise LoadError(
            f"{prefix} init '{start}' also changed the base weights, so the file is not valid on the original base. "
            "Save it with save_pretrained(…, path_initial_model_for_weight_conversion=…), which converts it to a plain LoRA.",
            option="init_lora_weights",
            given=start,
        )
    for key, what in UNSUPPORTED.items():
        value = config.get(key)
        if value not in (None, False, "none", "", [], {}):
            message = f"{prefix} {key}={repr(value)[:80]}: {what}, which veneer does not support. Nothing was loaded."
            raise LoadError(message, option=key, given=value)


def module_value(file: File, config: Mapping[str, Any], module: str, key: str, patterns: str, default: float) -> float:
    """A number of a module, such as its rank: from the first pattern that matches its path or its suffix, else the global value.

    Raises:
        LoadError: it is not a finite number, or the patterns are invalid.
    """
    values = config.get(patterns) or {}
    repeating = sum("*" in p or "+" in p for p in values) if isinstance(values, Mapping) else 0
    if not isinstance(values, Mapping) or len(values) > MOST or repeating > MOST_REPEATING:
        raise LoadError(
            f"{file.path}: {patterns} of peft's config must map up to {MOST:,} patterns, at most {MOST_REPEATING} of them with * "
            "or +, to numbers. The file is corrupt.",
            file=file.path,
            option=patterns,
        )
    try:
        found = match_pattern(values, module, config.get(key, default))
    except (ValueError, re.error) as error:
        message = f"{file.path}: {patterns} of peft's config is invalid ({error}). The file is corrupt."
        raise LoadError(message, file=file.path, option=patterns) from error
    found = default if found is None else found
    if type(found) not in (int, float) or not abs(found) < LARGEST_NUMBER:
        text = "of a huge number" if type(found) is int else str(found)[:80]
        message = f"{file.path}: peft's config has {key} {text} for '{module}'; expected a number. The file is corrupt."
        raise LoadError(message, file=file.path, option=key, where=module, given=text, expected="number")
    return float(found)


def is_enabled(file: File, config: Mapping[str, Any], key: str) -> bool:
    """True if an entry of the config is enabled; a missing entry is disabled.

    Raises:
        LoadError: it is neither true nor false.
    """
    value = config.get(key)
    if not (value is None or isinstance(value, bool)):
        message = f"{file.path}: peft's config has {key}={str(value)[:80]}; expected true or false. The file is corrupt."
        raise LoadError(message, file=file.path, option=key, given=str(value)[:80], expected=(True, False))
    return bool(value)


def match_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the value of the first pattern that matches the module's path or its suffix."""
    return next((v for p, v in patterns.items() if _may_match(p, module) and compile_pattern(p).match(module)), default)


def _may_match(pattern: str, module: str) -> bool:
    """False if lengths rule out a match of `^` and a literal path: a fast check, as configs have hundreds of these."""
    return len(pattern) == len(module) + 1 or not pattern.startswith("^") or not pattern[1:].replace(".", "").isidentifier()


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern for the end of a path."""
    return re.compile(rf"(.*\.)?({check_pattern(pattern)})$")


def check_pattern(pattern: str) -> str:
    """A regular expression that matches in bounded time.

    Raises:
        ValueError: it is too long or has nested repetitions, so that matching could take hours.
    """
    if len(pattern) > LONGEST or len(REPEATED.findall(pattern)) > 2 or not PATTERN.fullmatch(pattern):
        raise ValueError(f"'{pattern[:80]}' is not a supported name pattern")
    return pattern


def scaled_alpha(file: File, config: Mapping[str, Any], module: str, rank: int, key: str = "lora_alpha") -> float:
    """Alpha, to be divided by the rank; for rsLoRA, which divides by the square root of the rank, rescaled accordingly."""
    alpha = module_value(file, config, module, key, "alpha_pattern", DEFAULT_ALPHA if config else float(rank))
    return alpha * math.sqrt(rank) if is_enabled(file, config, "use_rslora") else alpha


def patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and a pattern for every module with another one. `^` anchors a pattern to the whole path."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{module}": value for module, value in values.items() if value != common}

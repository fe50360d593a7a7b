"""peft's `adapter_config.json`: what it says of a layer, and what of it would make another function here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.injection import LoadError

from .._io.reader import File, from_json

NAME = "adapter_config.json"
LARGEST = 2_000_000  # bytes
MOST, MOST_REPEATING, LONGEST = 4_096, 16, 1_000  # patterns of a config, those that repeat something, characters of one
REPEATED = re.compile(r"(?<!\\)[*+]")
# names, classes of letters, either of them repeated, and groups that are not: what repeats a repetition can take for ever
PATTERN = re.compile(r"(?:(?:\\[.dwsb\-]|\[[\w\-]+\]|[\w.^$|:/\- ])(?:[*+?]\??)?|\((?:\?:)?|\))*")
# what else may stand in a config, and means that the tensors alone are not the whole change
REFUSED = {
    "bias": "trained biases of the base", "lora_bias": "biases in its pairs", "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens", "target_parameters": "adapted parameters of other modules",
    "alora_invocation_tokens": "an adapter that waits for a token", "use_qalora": "pooled inputs", "arrow_config": "routing",
    "use_bdlora": "block-diagonal pairs", "kasa_config": "a truncated base", "monteclora_config": "sampled pairs",
    "velora_config": "compressed activations", "megatron_config": "sharded layers",
}  # fmt: skip
LARGEST_NUMBER = 1e30
DEFAULT_ALPHA = 8.0  # of peft, where a config says none
CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")  # initialisations that changed the base's weights


def read_config(file: File) -> dict[str, Any]:
    """The config beside a file.

    Raises:
        LoadError: there is none, or it is no JSON object of a known kind.
    """
    path = file.path.with_name(NAME)
    if not path.is_file():
        message = f"{file.path}: there is no {NAME} beside it, which has its alpha. Copy the whole folder."
        raise LoadError(message, file=file.path, missing=[NAME])
    try:
        with open(path, "rb") as opened:
            text = opened.read(LARGEST + 1).decode()
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: it is not JSON ({error}). It is damaged.", file=path, expected="JSON") from error
    config = from_json(text, f"{path}: it", LARGEST, file=path)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise LoadError(f"{path}: it names no peft_type. It is no config of peft.", file=path, option="peft_type")
    return config


def refuse(where: Path, config: Mapping[str, Any]) -> None:
    """Raise for what the tensors do not hold, or what no method here does.

    Args:
        where: the file that the config is in.
    Raises:
        LoadError: names the entry.
    """
    said = f"{where}: {config.get('peft_type', 'LORA')} with"
    start = str(config.get("init_lora_weights") or config.get("init_weights") or "")
    if start.lower().startswith(CHANGED):
        raise LoadError(
            f"{said} init '{start}', which changed the weights of the base as well: on the base itself the file means something "
            "else. Save it with save_pretrained(…, path_initial_model_for_weight_conversion=…), which makes a plain LoRA of it.",
            option="init_lora_weights",
            given=start,
        )
    for key, what in REFUSED.items():
        value = config.get(key)
        if value not in (None, False, "none", "", [], {}):
            message = f"{said} {key}={repr(value)[:80]}: {what}, which are another method. Nothing is loaded."
            raise LoadError(message, option=key, given=value)


def of(file: File, config: Mapping[str, Any], module: str, key: str, patterns: str, default: float) -> float:
    """A number of a module, such as its rank: of the first pattern that matches its path or the end of it, else the plain one.

    Raises:
        LoadError: it is no finite number, or the patterns are none.
    """
    told = config.get(patterns) or {}
    repeating = sum("*" in p or "+" in p for p in told) if isinstance(told, Mapping) else 0
    if not isinstance(told, Mapping) or len(told) > MOST or repeating > MOST_REPEATING:
        raise LoadError(
            f"{file.path}: {patterns} of peft's config is not up to {MOST:,} patterns, {MOST_REPEATING} of them with * or +, and "
            "their numbers. It is damaged.",
            file=file.path,
            option=patterns,
        )
    try:
        found = by_pattern(told, module, config.get(key, default))
    except (ValueError, re.error) as error:
        message = f"{file.path}: {patterns} of peft's config is none ({error}). It is damaged."
        raise LoadError(message, file=file.path, option=patterns) from error
    found = default if found is None else found
    if type(found) not in (int, float) or not abs(found) < LARGEST_NUMBER:
        shown = "of a huge number" if type(found) is int else str(found)[:80]
        message = f"{file.path}: peft's config gives '{module}' the {key} {shown}; expected a number. It is damaged."
        raise LoadError(message, file=file.path, option=key, where=module, given=shown, expected="number")
    return float(found)


def switched(file: File, config: Mapping[str, Any], key: str) -> bool:
    """Whether an entry of the config is on; what is not there is off.

    Raises:
        LoadError: it is neither true nor false.
    """
    value = config.get(key)
    if not (value is None or isinstance(value, bool)):
        message = f"{file.path}: peft's config has {key}={str(value)[:80]}; expected true or false. It is damaged."
        raise LoadError(message, file=file.path, option=key, given=str(value)[:80], expected=(True, False))
    return bool(value)


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the module's path or its end."""
    return next((v for p, v in patterns.items() if _may(p, module) and compiled(p).match(module)), default)


def _may(pattern: str, module: str) -> bool:
    """False where the length tells: `^` and a path match nothing longer or shorter. Configs have hundreds of these."""
    return len(pattern) == len(module) + 1 or not pattern.startswith("^") or not pattern[1:].replace(".", "").isidentifier()


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern for the end of a path."""
    return re.compile(rf"(.*\.)?({safe(pattern)})$")


def safe(pattern: str) -> str:
    """A regular expression that is quick on every name.

    Raises:
        ValueError: it is long, or repeats what repeats, so that a hostile one could match for hours.
    """
    if len(pattern) > LONGEST or len(REPEATED.findall(pattern)) > 2 or not PATTERN.fullmatch(pattern):
        raise ValueError(f"'{pattern[:80]}' is no pattern of names that is read here")
    return pattern


def scaled_alpha(file: File, config: Mapping[str, Any], module: str, rank: int, key: str = "lora_alpha") -> float:
    """Alpha as every reader divides it by the rank; rsLoRA's is divided by the root."""
    alpha = of(file, config, module, key, "alpha_pattern", DEFAULT_ALPHA if config else float(rank))
    return alpha * math.sqrt(rank) if switched(file, config, "use_rslora") else alpha


def patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and a pattern for every module that has another one. `^` ties a pattern to the whole path."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{module}": value for module, value in values.items() if value != common}

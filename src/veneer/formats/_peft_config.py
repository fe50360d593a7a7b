"""peft's `adapter_config.json`: what it says of a layer, and what of it would make another function here."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..injection import LoadError
from ._reading import File

NAME = "adapter_config.json"
LARGEST = 10_000_000  # bytes
# what else may stand in a config, and means that the tensors alone are not the whole change
REFUSED = {
    "bias": "trained biases of the base", "lora_bias": "biases in its pairs", "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens", "target_parameters": "adapted parameters of other modules",
    "alora_invocation_tokens": "an adapter that waits for a token", "use_qalora": "pooled inputs", "arrow_config": "routing",
    "use_bdlora": "block-diagonal pairs", "kasa_config": "a truncated base", "monteclora_config": "sampled pairs",
    "velora_config": "compressed activations", "megatron_config": "sharded layers",
}  # fmt: skip
CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")  # initialisations that changed the base's weights


def read_config(file: File) -> dict[str, Any] | None:
    """The config beside a file, or None if there is none.

    Raises:
        LoadError: it is no JSON object of a known kind.
    """
    path = file.path.with_name(NAME)
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST:
            raise LoadError(f"{path}: {path.stat().st_size:,} bytes, which no config has. It is damaged.")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path}: it is not JSON ({error}). It is damaged.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise LoadError(f"{path}: it names no peft_type. It is no config of peft.")
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
            "else. Save it with save_pretrained(…, path_initial_model_for_weight_conversion=…), which makes a plain LoRA of it."
        )
    for key, what in REFUSED.items():
        value = config.get(key)
        if value not in (None, False, "none", "", [], {}):
            raise LoadError(f"{said} {key}={value!r}: {what}, which are another method. Nothing is loaded.")


def of(file: File, config: Mapping[str, Any], module: str, key: str, patterns: str, default: float) -> float:
    """A number of a module, such as its rank: of the first pattern that matches its path or the end of it, else the plain one.

    Raises:
        LoadError: it is no number.
    """
    try:
        found = by_pattern(config.get(patterns) or {}, module, config.get(key, default))
        return float(default if found is None else found)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise LoadError(f"{file.path}: peft's config gives no {key} for '{module}' ({error}). It is damaged.") from error


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the module's path or its end."""
    return next((v for p, v in patterns.items() if _may(p, module) and _compiled(p).match(module)), default)


def _may(pattern: str, module: str) -> bool:
    """False where the length tells: `^` and a path match nothing longer or shorter. Configs have hundreds of these."""
    return len(pattern) == len(module) + 1 or not pattern.startswith("^") or not pattern[1:].replace(".", "").isidentifier()


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def scaled_alpha(file: File, config: Mapping[str, Any], module: str, rank: int, key: str = "lora_alpha") -> float:
    """Alpha as every reader divides it by the rank; rsLoRA's is divided by the root."""
    alpha = of(file, config, module, key, "alpha_pattern", float(rank))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and a pattern for every module that has another one. `^` ties a pattern to the whole path."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{module}": value for module, value in values.items() if value != common}

"""Options of a run that have no field in the form, as TOML text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tomlkit
from tomlkit.exceptions import ParseError

from veneer import methods
from veneer.config_file import entries_of
from veneer.injection import OptionError
from veneer.training.method_names import split_methods
from veneer.training.personalization_config import PersonalizeConfig

from ...limits import LIMITS
from ...workspace import check_text, printable
from ..shared.config_form import check_flags, fields_of, flags_of, text_of

OTHER = (
    "prior_loss_weight", "template", "tag_dropout", "keep_tokens", "shuffle_tags", "masks", "gradient_accumulation_steps",
    "text_learning_rate", "token_learning_rate", "warmup", "loss_weighting", "timestep_sampling", "prediction", "loss",
    "noise_offset", "pyramid_noise", "input_perturbation", "cache", "prompts", "drift_prompts", "truncate", "eval",
    "optimizer_args", "max_grad_norm", "cycles", "power", "min_lr_ratio", "block_lr", "preview_steps", "preview_scheduler",
)  # fmt: skip
"""Accepted options of `PersonalizeConfig`. None of them is a path."""
HIGHEST = {"gradient_accumulation_steps": LIMITS.batch, "preview_steps": LIMITS.steps}
"""Option to its limit."""
MOST = {"template": LIMITS.photos, "prompts": LIMITS.images, "drift_prompts": LIMITS.images}
"""Option to its maximum number of texts."""


def read_other(text: str, method: str) -> dict[str, Any]:
    """The options in a TOML text; tables are options of the methods besides the one in the form.

    Args:
        method: the methods of the run, as in the form.
    Raises:
        OptionError: invalid TOML, an unknown option (with the nearest name), one that is not accepted, or a wrong value.
    """
    try:
        content: dict[str, Any] = tomlkit.parse(check_text(text, "other options", LIMITS.config_text)).unwrap()
    except ParseError as error:
        message = f"other options: {error}; expected lines such as warmup = 10."
        raise OptionError(message, option="other", where="other options", given="syntax") from error
    content = {key.replace("-", "_"): value for key, value in content.items()}
    names = split_methods(method)
    entries_of(content, PersonalizeConfig, {name: methods.get(name) for name in names})
    accepted = (*OTHER, *names[:-1])
    for key in content:
        if key not in accepted:
            message = f"other options: {printable(key)} is not accepted here; expected one of {', '.join(accepted)}."
            raise OptionError(message, option="other", where=key, given=key, expected=accepted)
    return content


def other_flags(text: str, method: str) -> list[str]:
    """Command-line flags for the options in a TOML text.

    Raises:
        OptionError: see `read_other`; or a value beyond the limits, or one that the command would reject.
    """
    content = read_other(text, method)
    _check_limits(content)
    flags = [word for name, value in content.items() if name in OTHER for word in _flags(name, value)]
    check_flags(PersonalizeConfig, flags)
    for name in content.keys() - {*OTHER}:
        fields = fields_of(methods.get(name))
        values = {key.replace("-", "_"): value for key, value in content[name].items()}
        texts = [values.get(f.name, f.default) if f.kind == "check" else text_of(values.get(f.name)) for f in fields]
        flags += flags_of(methods.get(name), fields, texts, name)
    return flags


def to_text(content: Mapping[str, Any]) -> str:
    """The options as TOML, with which `read_other` reads them again."""
    return tomlkit.dumps(content).strip()


def _check_limits(content: Mapping[str, Any]) -> None:
    for name, limit in HIGHEST.items():
        if (given := content.get(name, 0)) > limit:
            raise OptionError(f"{name} is {given}; expected at most {limit}.", option=name, given=given, expected=limit)
    for name, limit in MOST.items():
        if (count := len(_items(content.get(name, ())))) > limit:
            raise OptionError(f"{name}: {count} texts; expected at most {limit}.", option=name, given=count, expected=limit)


def _flags(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{flag}"]
    if not isinstance(value, (Mapping, list)):
        return [f"--{flag}={value}"]
    parts = [f"{key}={_plain(each)}" for key, each in value.items()] if isinstance(value, Mapping) else list(map(str, value))
    if wrong := [part for part in parts if part.startswith("-")]:
        message = f"{name}: {printable(wrong[0])!r} begins with '-'; expected a text that does not."
        raise OptionError(message, option=name, given=wrong[0])
    return [f"--{flag}", *parts] if parts else []


def _plain(value: Any) -> str:
    """Value of a `key=value` pair."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]

"""Selects layers by the paths of their modules, for users who know peft's `target_modules`.

    module:to_q                      each layer whose path is `to_q` or ends with `.to_q`
    module:to_out.0                  the same with a dot
    module:.*attn\\.(qkv|proj)        a regular expression for the whole path, if it has other special characters than dots
    module:all-linear                each linear layer, without heads of classifiers

A fused layer, such as the `qkv` of timm, is one layer, as in peft, and not a site for each of q, k and v.
Source: `target_modules` of peft's `LoraConfig`, where a list of names matches ends of paths, and a string the whole path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from .errors import SelectionError
from .sites import Site, WeightSite

MODULE = "module:"
ALL_LINEAR = "all-linear"


def module_patterns(targets: Sequence[str]) -> tuple[str, ...]:
    """Patterns of a selection that match what peft's `target_modules` match.

    Args:
        targets: names of modules, regular expressions, or `all-linear`.
    """
    return tuple(MODULE + target for target in targets)


def is_target(site: Site, target: str) -> bool:
    """Whether a site is a layer whose module path matches.

    Raises:
        SelectionError: the target is not a valid regular expression.
    """
    if not isinstance(site, WeightSite):
        return False
    if target == ALL_LINEAR:
        return site.kind == "linear" and site.role.split(".")[0] != "head"
    return _expression(target).fullmatch(site.path) is not None


@cache
def _expression(target: str) -> re.Pattern[str]:
    if re.fullmatch(r"[\w.-]+", target):
        return re.compile(rf"(.*\.)?{re.escape(target)}")
    try:
        return re.compile(target)
    except re.error as error:
        message = f"'{target}' is not a regular expression: {error}. Expected one, such as .*to_[qk], or a name, such as to_q."
        raise SelectionError(message, pattern=MODULE + target, given=target) from None

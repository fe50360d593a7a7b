"""Block index and stage of each module, by timm's own groups of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

BLOCKS = re.compile(r"(?<!^)\.(?:blocks|layers|transformer_encoder)\.(\d+)(?=\.|$)")
LISTS = r"^(?:encoder\.)?(?:stages|transformers|levels|blocks|layers)\.(\d+)"


def depths(model: Any, names: Iterable[str]) -> dict[str, int]:
    """Block index of each parameter name that is in a block, counted from 0 without gaps.

    A block is a group of layers of timm's `group_matcher`, which also defines its layer-wise learning rates. Groups that are
    whole stages are split by the lists of blocks inside them. Stem and head have no depth.
    """
    from timm.models._manipulate import group_with_matcher

    names = list(names)
    matcher: Any = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else {"blocks": LISTS}
    outside = "\0"  # a name that no pattern matches: its group is that of the head
    groups = group_with_matcher(((name, None) for name in [*names, outside]), matcher, reverse=True)
    inside = [name for name in names if groups[name] != groups[outside] and not _is_stem(matcher, name)]
    places = {name: (groups[name], _number(name)) for name in inside}
    order = {place: i for i, place in enumerate(sorted(set(places.values())))}
    return {name: order[place] for name, place in places.items()}


def _number(name: str) -> int:
    """Index of the block in its stage; 0 outside a list of blocks."""
    match = BLOCKS.search(name)
    return int(match[1]) if match else 0


def _is_stem(matcher: Any, name: str) -> bool:
    if not isinstance(matcher, dict):
        place = matcher(name)
        return place in (0, (0,))
    return any(re.match(pattern, name) for group, pattern in matcher.items() if "stem" in group and isinstance(pattern, str))


def stages(model: Any, count: int) -> dict[str, str]:
    """Module path of each stage in timm's `feature_info` -> its label; empty if these are the `count` blocks themselves."""
    info = getattr(model, "feature_info", None) or ()
    paths = [entry.get("module", "") for entry in info] if isinstance(info, (list, tuple)) else []
    paths = list(dict.fromkeys(path for path in paths if path))
    return {path: f"stage.{i}" for i, path in enumerate(paths)} if len(paths) < count else {}

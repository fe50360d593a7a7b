"""Mutations of the JSON in a file or beside it: veneer's header, peft's config, lists of tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.formats.malformed.draft import Draft, mutation
from tests.formats.malformed.of_tensors import NAMES

KEYS = ("veneer", "lora_adapter_metadata", "tokens", "text_encoder")  # of metadata, whose values are JSON
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2.5, 10**9, 10**30, -(10**9), 1e308, math.nan, math.inf, -math.inf, -0.0,
    "", "x", "8", "nan", "True", "[", "a" * 10**5, "\ud800", "(a+)+$", "(.*)*x",
    "pissa", "tk", "input", "output", "both", "low_rank",
    "bgr", "rgb", "BGR", "full_adapter", "light_adapter", "full_adapter_xl", "full", "a full_adapter", "ControlNetUnionModel",
    [], [1], ["x"], [[]], [None], ["fc", 5], ["a"] * 10**4, [0, 0], [2, 2], [-1, 4], [10**9, 10**9],
    {}, {"x": 1}, {"[": 1}, {"*": {"x": 1}}, {"fc": {"sides": [0, 0]}}, {"(a|a)*$": 2}, {"(.*.*.*.*.*)*fc": 2},
    {"name:fc": 5}, {"name:fc": {"rank": 10**9}}, {"name:fc": {"rank": None}}, {"name:fc": {"by_site": {}}},
    {f"k{i}": i for i in range(3000)},
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def changed(value: Any, rng: Random) -> Any:
    """Replace, remove, duplicate or rename one entry of a JSON value."""
    where = list(places(value))
    if not where or rng.random() < 0.05:
        return rng.choice(HOSTILE)
    holder, key = rng.choice(where)
    how = rng.random()
    if how < 0.6:
        holder[key] = rng.choice(HOSTILE)
    elif how < 0.75:
        del holder[key]
    elif isinstance(holder, list):
        holder.append(holder[key])
    else:
        name = rng.choice([*NAMES[:12], key + "x", "name:gone", "rank", "by_site"])
        holder[name] = holder.pop(key) if how < 0.9 else rng.choice(HOSTILE)
    return value


@mutation("json")
def json_with_something_else(draft: Draft, rng: Random) -> None:
    if draft.config is not None:
        draft.config = changed(draft.config, rng)
        return
    for key in set(KEYS) & draft.metadata.keys():
        draft.metadata[key] = json.dumps(changed(json.loads(draft.metadata[key]), rng))


OPTIONS = (
    "by_site", "rank", "alpha", "ranks", "alphas", "init", "tucker", "rslora", "sides", "low",
    "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern",
)  # fmt: skip


@mutation("json")
def options_with_something_else(draft: Draft, rng: Random) -> None:
    """Of a method in veneer's own header, or of peft's config: hostile values of known names."""
    own = json.loads(draft.metadata["veneer"]) if "veneer" in draft.metadata else None
    config = draft.config if draft.config is not None else rng.choice(own["attachments"])["config"] if own else None
    if config is None:
        return json_with_something_else(draft, rng)
    config[rng.choice([*config, *OPTIONS])] = rng.choice(HOSTILE)
    if own:
        draft.metadata["veneer"] = json.dumps(own)


@mutation("json")
def another_method(draft: Draft, rng: Random) -> None:
    """An unknown method, or one with other tensors; a version; another base."""
    if "veneer" not in draft.metadata:
        return json_with_something_else(draft, rng)
    header = json.loads(draft.metadata["veneer"])
    base, entry = header["base"], rng.choice(header["attachments"])
    fields: dict[str, list[Any]] = {
        "version": [0, 2, "1", 1.0, True, None, [1], 10**30],
        "attachments": [header["attachments"] * n for n in (0, 2, 3)],
        "base": [{}, {"x": base}, {"": {"class": "Net", "without": []}}, {key: {} for key in base}],
    }
    own: dict[str, list[Any]] = {
        "method": [
            "lorra", "loha", "svdiff", "fact", "vpt", "boft", "bitfit", "textual_inversion", "../x", "_low_rank", "", "adalora",
        ],
        "config": [{}, {"rank": 65000}, {"tokens": 10**9}, {"m": 10**6}, {"vectors": 10**9}, {"inputs": "*"}],
        "shared": [{"fc:down": []}, {"fc:down": "gone"}, {"x": next(iter(draft.entries))}, {"fc:down": {}}, {"": ""}],
        "sites": [[], ["*"], ["fc", "fc"], ["fc.bias"], ["gone"], ["table", "conv", "fc", "out"], ["out:weight"]],
        "name": ["", "a/b", "lora", "../x", "x" * 10**4, "a b", "é", "\ud800", header["attachments"][0]["name"]],
    }  # fmt: skip
    own["trained"] = own["sites"]
    holder, values = rng.choice([(header, fields), (entry, own), (entry, own)])
    for key in rng.sample(list(values), rng.choice([1, 1, 2])):
        holder[key] = rng.choice(values[key])
    draft.metadata["veneer"] = json.dumps(header)


@mutation("json")
def json_that_is_none(draft: Draft, rng: Random) -> None:
    """Text that is not JSON, or JSON of another type, very large, or with a duplicate key."""
    much = ["[" * 10**5, "[" + "{}," * 10**6 + "{}]", "{" + "".join(f'"{i}": 1, ' for i in range(10**5)) + '"99999": 2}']
    texts = ["{", "", "nul", "NaN", "[1", "5", '"x"', "null", "[]", "{}", "{}" * 2, "\ufeff{}", '{"a": 1, "a": 2}', *much]
    for key in set(KEYS) & draft.metadata.keys():
        text = draft.metadata[key]
        twice = text[:-1] + ', "version": 1, "r": 3, "unet.r": 3, ' + text[1:] if text.startswith("{") else text
        draft.metadata[key] = rng.choice([*texts, text[: rng.randrange(len(text))], twice])
    told = json.dumps(draft.config)
    draft.text = rng.choice([*texts, "\x80\x04", f'{told[:-1]}, "r": 5}}', told[:-3]])


@mutation("json")
def the_same_in_other_words(draft: Draft, rng: Random) -> None:
    """Equivalent JSON: a value per level instead of one for all, another numeric type, null and false swapped."""
    if not isinstance(draft.config, dict):
        return json_with_something_else(draft, rng)
    for key in rng.sample(list(draft.config), rng.choice([1, 1, 3])):
        value = draft.config[key]
        words: list[Any] = [[value], [value] * 2, [value] * 3, {"0": value}, [[value] * 3], str(value)]
        if isinstance(value, (int, float)):
            words += [float(value), bool(value), int(value), -value]
        elif isinstance(value, list) and value:
            words += [value[0], value[:-1], [*value, value[-1]], value[::-1], {str(i): v for i, v in enumerate(value)}]
        else:
            words += [None, False, 0, "", []]
        draft.config[key] = rng.choice(words)


@mutation("json")
def json_that_is_deep(draft: Draft, rng: Random) -> None:
    """A value nested up to the parser's limit, or a little more or less."""
    if not isinstance(draft.config, dict):
        return json_that_is_none(draft, rng)
    depth = rng.choice([rng.randrange(850, 1000), rng.randrange(900, 990), 10_000, 200_000])
    start, end = rng.choice([("[", "]"), ('{"a": ', "}")])
    told = json.dumps({**draft.config, rng.choice(list(draft.config)): "DEEP"})
    draft.text = told.replace('"DEEP"', start * depth + "1" + end * depth)

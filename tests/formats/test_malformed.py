"""A few of the files of `tests.formats.malformed`: every mutation of every format; and wrong loaders are detected."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.formats.malformed import verdict
from tests.formats.malformed.draft import MUTATIONS
from tests.formats.malformed.guide_meanings import OPTIONS
from tests.formats.malformed.models import model
from tests.formats.malformed.verdict import Case, Pair, Verdict, judge, ready
from veneer.formats import ip_adapter, load_all, t2i_adapter
from veneer.formats._core import lora_reader
from veneer.formats._io import reader
from veneer.formats._lycoris import loha
from veneer.injection import LoadError, attach, attachments

NUMBERS = range(6)
SLOWER = 20.0  # times the limit of the command: other work on the machine is no fault of the files


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Pair]]:
    """Every good file with each applicable mutation."""
    with ready(tmp_path_factory.mktemp("good")) as found:
        yield found


def first_wrong(pair: Pair, folder: Path) -> Verdict | None:
    """The first of a few files that is rejected or loaded wrongly."""
    found = (judge(Case.of(pair, number, 0, folder / "x"), SLOWER) for number in NUMBERS)
    return next((one for one in found if one.what == "wrong"), None)


@pytest.mark.parametrize("mutation", [m.name for m in MUTATIONS])
def test_malformed_files_are_rejected_or_mean_what_they_say(mutation: str, pairs: list[Pair], tmp_path: Path) -> None:
    """One file of each format, and one of all control formats; another of several for each mutation."""
    index = next(i for i, m in enumerate(MUTATIONS) if m.name == mutation)
    by_format: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair[1].name == mutation:
            by_format.setdefault("control" if pair[0].format in OPTIONS else pair[0].format, []).append(pair)
    chosen = [some[index % len(some)] for some in by_format.values()]
    found = [judge(Case.of(pair, 100 * index + i, 0, tmp_path / "x"), SLOWER) for i, pair in enumerate(chosen)]
    assert found
    assert [v for v in found if v.what == "wrong"] == []


# each of these loaders does one thing wrong, and is caught within a few files


def spends(*args: Any) -> Any:
    """A load that allocates far more memory than the file needs."""
    return len(b"x" * 600_000_000) and load_all(*args)


def keeps(model: Any, path: Path) -> Any:
    """A rejection after which something stays attached."""
    attach(model, "lora", where="mlp.in", rank=1)
    raise LoadError(f"{path}: it is refused, and what was attached stays attached.")


def mumbles(model: Any, path: Path) -> Any:
    raise LoadError("it does not work")


def turned_keys(number: int, end: str) -> str:
    """Keys for values, and values for keys."""
    other = {"to_k_ip.weight": "to_v_ip.weight", "to_v_ip.weight": "to_k_ip.weight"}
    return f"ip_adapter.{2 * number + 1}.{other[end]}"


def fails(model: Any, path: Path) -> Any:
    raise KeyError(str(path))


@pytest.mark.parametrize(
    ("good", "mutation", "where", "name", "instead", "why"),
    [
        ("kohya", "a_special_value", reader, "is_finite", lambda tensor: True, "its bytes say nothing"),
        ("native-lora", "json_that_is_none", reader, "unique_keys", dict, "its bytes say nothing"),
        ("lycoris-loha", "turned_shape", loha, "has_row_order", lambda *_: True, "its bytes say nothing"),
        (
            "lycoris-lora",
            "one_more_remark",
            lora_reader,
            "alpha_of",
            lambda f, n, t, rank: float(rank),
            "something else than it says",
        ),
        ("ip-base", "one_more_remark", ip_adapter, "_key", turned_keys, "something else than it says"),
        ("t2i-full_adapter", "the_same_in_other_words", t2i_adapter, "_compare", lambda *_: None, "its bytes say nothing"),
        ("peft-lora", "one_more_remark", verdict, "SECONDS", 0.0, "s of the processor"),
        ("peft-lora", "cut_short", verdict, "load_all", spends, " MB"),
        ("peft-lora", "cut_short", verdict, "load_all", keeps, "not restored"),
        ("peft-lora", "cut_short", verdict, "load_all", mumbles, "does not say enough"),
        ("peft-lora", "cut_short", verdict, "load_all", fails, "KeyError"),
        ("peft-lora", "one_more_remark", verdict, "load_all", mumbles, "must load"),
    ],
)
def test_a_wrong_loader_is_detected(
    good: str, mutation: str, where: Any, name: str, instead: Callable[..., Any], why: str,
    pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pair = next(pair for pair in pairs if (pair[0].name, pair[1].name) == (good, mutation))
    assert first_wrong(pair, tmp_path) is None
    monkeypatch.setattr(where, name, instead)
    gc.collect()  # what earlier tests left would be freed during the load and hide the memory that it takes
    found = first_wrong(pair, tmp_path)
    assert found is not None
    assert why in found.why
    assert attachments(model(pair[0].model)) == []

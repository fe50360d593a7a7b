"""Bytes of optimizer state per parameter."""

from __future__ import annotations

import pytest

from veneer.training.preflight.optimizer_state import STATES, state_bytes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adamw", 8), ("lion", 4), ("adan", 16), ("nadamw", 8), ("schedule_free_adamw", 8), ("schedule_free_sgd", 4),
     ("lion8bit", 1), ("paged_adamw8bit", 2), ("lamb", 8), ("came", 8), ("bnbadam", 8)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_bytes_of_state_are_those_of_its_tensors(name: str, expected: float) -> None:
    """Two moments of Adam, one of Lion, three and the last gradient of Adan; 8 bits with scales of blocks and a table of 256."""
    overhead = 0.3 if name.endswith("8bit") else 0.01
    assert expected <= state_bytes(name) <= expected + overhead


@pytest.mark.parametrize("name", ["sgd", "prodigy"])
def test_known_sizes_are_those_of_the_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = STATES[name]
    monkeypatch.delitem(STATES, name)
    state_bytes.cache_clear()
    assert state_bytes(name) == pytest.approx(known, abs=0.01)
    state_bytes.cache_clear()

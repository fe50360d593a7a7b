"""For all tests: tiers by path, and a garbage collector that skips what imports and collection have created."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


TIERS = {
    "matrix": ("matrix/",),
    "browser": ("apps/test_browser", "apps/test_clients.py"),
    "training": (),
}
"""Marker to the beginnings of paths below `tests`, beside tests that have the marker themselves."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds the marker of its tier to each test."""
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root).as_posix()
        for tier, beginnings in TIERS.items():
            if path.startswith(beginnings):
                item.add_marker(tier)

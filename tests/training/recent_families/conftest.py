"""The tiny pipelines of these tests, built once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from .tiny import tiny


@pytest.fixture(scope="session")
def pipe_of() -> Callable[[str], Any]:
    """The tiny pipeline of a family, always the same."""
    return functools.cache(tiny)

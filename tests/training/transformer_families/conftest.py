"""The tiny pipelines of these tests, built once."""

from __future__ import annotations

from typing import Any

import pytest

from .tiny import PIPELINES, tiny


@pytest.fixture(scope="session")
def pipes() -> dict[str, Any]:
    return {name: tiny(name) for name in PIPELINES}

"""Expect errors and warnings by their class and the data that they carry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def carries(error: BaseException | str, **data: Any) -> None:
    """Assert that an error or a warning has these attributes; a path equals its text."""
    assert data, "name the attributes that tell this error from its neighbors"
    found = {name: _plain(getattr(error, name, "no such attribute")) for name in data}
    assert found == {name: _plain(value) for name, value in data.items()}, str(error)


@contextmanager
def raises(error: type[BaseException], **data: Any) -> Iterator[pytest.ExceptionInfo[Any]]:
    """`pytest.raises` that also compares attributes of the error.

    Args:
        error: expected class. data: attributes of the error and their values, at least one.
    """
    with pytest.raises(error) as caught:
        yield caught
    carries(caught.value, **data)


@contextmanager
def warns(warning: type[Warning], **data: Any) -> Iterator[pytest.WarningsRecorder]:
    """`pytest.warns` that also compares attributes of each warning of this class."""
    with pytest.warns(warning) as caught:
        yield caught
    for each in caught:
        if issubclass(each.category, warning):
            carries(each.message, **data)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value

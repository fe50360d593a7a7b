"""Expect an error by its class and the data that it carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def raises(error: type[BaseException], **data: Any) -> Iterator[pytest.ExceptionInfo[Any]]:
    """`pytest.raises` that also compares attributes of the error.

    Args:
        error: expected class. data: attributes of the error and their values, at least one.
    """
    assert data, "name the attributes that tell this error from its neighbors"
    with pytest.raises(error) as caught:
        yield caught
    found = {name: getattr(caught.value, name, "no such attribute") for name in data}
    assert found == data, f"{found}, expected {data}"

"""Registers the host of the toy model for these tests only."""

from collections.abc import Iterator

import pytest

from tests.injection.toy import ToyHost
from veneer.injection.registry import hosts


@pytest.fixture(autouse=True)
def toy_host() -> Iterator[None]:
    hosts.register(ToyHost)
    yield
    hosts.unregister("toy")

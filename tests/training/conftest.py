"""The process that trains, and is killed, for the tests of exact resume: its imports take seconds, so that files share it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.training.test_resume import Worker


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    from tests.training.test_resume import Worker

    worker = Worker(tmp_path_factory.mktemp("worker") / "stderr.txt")
    yield worker
    worker.close()

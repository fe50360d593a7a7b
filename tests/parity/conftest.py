"""The oracles run only if a folder of clones is named."""

from __future__ import annotations

import os

from tests.parity.sources import SOURCES

collect_ignore = [] if os.environ.get(SOURCES) else ["test_oracles.py"]

"""How events of pages run."""

from __future__ import annotations

from typing import Any

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that only change fields."""
DRAWS: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1, "api_visibility": "private"}
"""Of events that draw: one after the other, over all visitors."""
FILES: dict[str, Any] = {"concurrency_id": "files", "concurrency_limit": 1, "api_visibility": "private"}
"""Of events that load a base for files: one at a time, and not in the way of pictures."""

"""Options of Gradio events."""

from __future__ import annotations

from typing import Any

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""For events that only update fields."""
GENERATION: dict[str, Any] = {"concurrency_id": "generate", "concurrency_limit": 1, "api_visibility": "private"}
"""For events that generate images: one at a time over all users."""
FILES: dict[str, Any] = {"concurrency_id": "files", "concurrency_limit": 1, "api_visibility": "private"}
"""For events that load a base model to process files: one at a time, independent of image generation."""

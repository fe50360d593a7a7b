"""PNG files with the settings of an image as JSON in their metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from veneer.atomic_files import write_atomically
from veneer.injection.errors import VeneerError

KEY = "veneer"
"""Name of the PNG text entry that holds the settings as JSON."""


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> Path:
    """Writes a PNG with `settings` as JSON in its text metadata, atomically. Returns the path.

    Raises:
        TypeError: settings that are not JSON values.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt(KEY, json.dumps(dict(settings), ensure_ascii=False, sort_keys=True))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=text)
    write_atomically(Path(path), data.getvalue())
    return Path(path)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads the settings of a PNG written by `save_png`.

    Raises:
        VeneerError: another type of file, or a PNG without settings.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            found: dict[str, Any] = json.loads(image.info[KEY])
    except (KeyError, OSError, ValueError, SyntaxError) as error:
        message = f"{path}: no settings found ({type(error).__name__}); expected a PNG written by veneer."
        raise VeneerError(message, file=path, where="settings") from error
    return found

"""PNG files with the settings of an image as JSON in their metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from veneer.atomic_files import write_atomically
from veneer.injection.errors import VeneerError

KEY = "veneer"
"""Name of the PNG text entry that holds the settings as JSON."""
SAMPLES = "samples"
"""Folder of a run's generated images, which `veneer push` uploads."""


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


def save_samples(out: Path, images: Sequence[tuple[Image.Image, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Writes generated images to `samples/00.png` and so on, and returns their records: `file` and the settings.

    Args:
        out: folder of the run. `images`: each with its settings, such as `prompt` and `seed`.
    """
    records = []
    for index, (image, settings) in enumerate(images):
        file = Path(SAMPLES) / f"{index:02d}.png"
        (out / file).parent.mkdir(exist_ok=True)
        save_png(image, out / file, settings)
        records.append({"file": file.as_posix(), **settings})
    return records


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

"""Generated images of a user, kept in the workspace: bounded in number and size, newest first, in pages."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.injection import UnknownName, VeneerError
from veneer.training.report.png_metadata import read_settings

from .limits import LIMITS, Limits
from .workspace import Workspace, printable

Updates = Iterable[tuple[list[tuple[str, str]], str]]
"""Image files with captions so far, and the progress, as the pages yield them."""


@dataclass(frozen=True)
class ImageStore:
    """Images of one user as PNG files with their settings, named by the time at which they were stored.

    Args:
        folder: of the images.
        limits: `gallery_images` and `gallery_bytes`; beyond them the oldest images are deleted.
    """

    folder: Path
    limits: Limits = LIMITS

    @staticmethod
    def of(workspace: Workspace) -> ImageStore:
        """The store of a user."""
        return ImageStore(workspace.folder / "images")

    def files(self) -> list[Path]:
        """All images, newest first."""
        return sorted(self.folder.glob("*.png"), reverse=True)

    def page(self, number: int, size: int) -> tuple[list[Path], int, int]:
        """The images of a page, its number, and the number of pages; a number beyond the last page gives the last.

        Args:
            number: from 0. `size`: images of a page.
        """
        files = self.files()
        pages = max(1, -(-len(files) // size))
        number = min(max(0, number), pages - 1)
        return files[number * size : (number + 1) * size], number, pages

    def find(self, name: str) -> Path:
        """The file of an image.

        Raises:
            VeneerError: the user has no image of that name.
        """
        file = next((path for path in self.files() if path.name == name), None)
        if file is None:
            message = f"you have no image {printable(name)!r}; it may have been deleted. Choose one from the gallery."
            raise UnknownName(message, name, "image")
        return file

    def add(self, path: Path) -> None:
        """Copies an image into the store; an image without the settings of a prompt, such as a map, is left out.

        Nothing is stored while the disk has less than `LIMITS.disk_free` bytes.
        """
        try:
            settings = read_settings(path)
        except VeneerError:
            return
        if not isinstance(settings, dict) or not isinstance(settings.get("prompt"), str):
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free < self.limits.disk_free:
            return
        temporary = self.folder / f".{time.time_ns():020d}"
        shutil.copyfile(path, temporary)
        os.replace(temporary, temporary.with_name(f"{time.time_ns():020d}.png"))
        self._prune()

    def delete(self, name: str) -> None:
        """Deletes an image.

        Raises:
            VeneerError: the user has no image of that name.
        """
        self.find(name).unlink(missing_ok=True)

    def _prune(self) -> None:
        """Deletes the oldest images beyond the limits."""
        total = 0
        for index, path in enumerate(self.files()):
            with contextlib.suppress(FileNotFoundError):  # another request has deleted it
                total += path.stat().st_size
                if index >= self.limits.gallery_images or total > self.limits.gallery_bytes:
                    path.unlink()


def store_images(workspace: Workspace, updates: Updates) -> Iterator[tuple[list[tuple[str, str]], str]]:
    """Passes on the updates of a generation, and stores each image as soon as it is there."""
    store, stored_paths = ImageStore.of(workspace), set[str]()
    for items, progress in updates:
        for path, _ in items:
            if path not in stored_paths:
                stored_paths.add(path)
                store.add(Path(path))
        yield items, progress


def settings_of(path: Path) -> dict[str, Any]:
    """Settings of a stored image; empty if they are unreadable."""
    try:
        settings = read_settings(path)
    except VeneerError:
        return {}
    return settings if isinstance(settings, dict) else {}

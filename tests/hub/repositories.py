"""Contents of repositories and of folders that `veneer push` has written."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from .server import Hub


def card(folder: Path) -> ModelCard:
    """The model card in a folder."""
    return ModelCard.load(folder / "README.md")


def uploaded(hub: Hub, name: str) -> dict[str, bytes]:
    """Files of the newest commit of a repository."""
    return hub.repositories[name].commits[-1][1]

"""Downloads from the model hub, which fail fast if the hub is unreachable."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

from veneer.injection.errors import BaseModelError, VeneerError

from .errors import describe

TRIES, TIMEOUT, WAIT = 2, 5.0, 0.5
"""Attempts before the hub counts as unreachable; timeout of each and delay between them, in seconds."""


def unreachable() -> str:
    """Why the model hub is unreachable; empty if it responds, with any status."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "offline mode is enabled (HF_HUB_OFFLINE)"
    for left in reversed(range(TRIES)):
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
            return ""
        except Exception as error:  # depends on the HTTP library of the hub's client
            why = f"{constants.ENDPOINT} is unreachable ({type(error).__name__})"
        if left:
            time.sleep(WAIT)
    return why


@contextlib.contextmanager
def hub(required: bool = True) -> Iterator[str]:
    """Context manager for downloads: limits them to the local cache if the hub is unreachable, without 23 s of retries per file.

    Args:
        required: False for a local folder, which disables the check.
    Yields:
        Why the hub is unreachable; empty if it responds.
    """
    if not required:
        yield ""
        return
    from huggingface_hub import constants

    why = unreachable()
    before = constants.HF_HUB_OFFLINE
    if why:
        constants.HF_HUB_OFFLINE = True
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def download(source: str) -> Iterator[dict[str, Any]]:
    """Context manager for what is loaded from the hub, whose errors become one that says what to do.

    Args:
        source: the hub name of the base model.
    Yields:
        Arguments of `from_pretrained` and `load_config`: local files only, if the hub is unreachable.
    Raises:
        BaseModelError: an error of another library inside the block.
    """
    with hub() as why, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument", UserWarning)  # which diffusers passes
        try:
            yield {"local_files_only": True} if why else {}
        except VeneerError:
            raise
        except Exception as error:  # the hub's clients raise a dozen kinds, of several libraries
            raise BaseModelError(
                f"load: {source!r} is not a local folder, and could not be loaded from the hub "
                f"({why or describe(error)}). "
                "Check the name and the connection, or use a diffusers folder or 'bundled'.",
                where="hub",
                given=source,
            ) from error

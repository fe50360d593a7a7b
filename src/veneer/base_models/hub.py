"""Downloads from the model hub that fail at once where the hub cannot be reached."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

TRIES, TIMEOUT, WAIT = 2, 5.0, 0.5
"""Requests before the hub counts as unreachable; seconds for each, and between them."""


def unreachable() -> str:
    """Why the model hub cannot be reached; empty if it answers, whatever it answers."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "offline mode is enabled (HF_HUB_OFFLINE)"
    for left in reversed(range(TRIES)):
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
            return ""
        except Exception as error:  # of whichever HTTP library the hub's client uses
            why = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
        if left:
            time.sleep(WAIT)
    return why


@contextlib.contextmanager
def hub(asked: bool = True) -> Iterator[str]:
    """Load from the hub, or from its local cache alone if it cannot be reached. Its client would retry each file for 23 s.

    Args:
        asked: False for a local folder; nothing is looked at or changed then.
    Yields:
        Why the hub cannot be reached; empty if it answers, and then nothing is changed either.
    """
    if not asked:
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

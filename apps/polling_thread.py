"""A thread that does something at intervals."""

from __future__ import annotations

import threading


class PollingThread:
    """Calls `poll` every `seconds` between `start` and `close`.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stops the thread, after the current call."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def poll(self) -> None:
        """What is done at each interval."""
        raise NotImplementedError

    def _loop(self) -> None:
        while not self._stopped.wait(self.seconds):
            self.poll()

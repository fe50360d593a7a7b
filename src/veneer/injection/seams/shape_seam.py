"""A call seam whose adapters give another shape than the host's, so that they act or do not."""

from __future__ import annotations

from ..errors import StateError
from .call_seam import CallSeam


class SwitchSeam(CallSeam):
    """For adapters that say `switches`. Between off and on a compiled graph is another one: a guard, not a buffer."""

    def check_strength(self, strength: float) -> None:
        """Raise `StateError` for a strength that is neither 0 nor 1."""
        if strength not in (0, 1):
            site = self.sites[0].name
            message = f"{site}: what it gives has another shape than the host's; strength must be 0 or 1, got {strength}."
            raise StateError(message, where=site, given=strength, expected=(0, 1))

    def asleep(self) -> bool:
        """True at strength 0, also in what is recorded: there is nothing in between that a buffer could tell."""
        return self.idle

"""How long a job takes from its start to its files: by the visitor's last job like it, else by a reference machine."""

from __future__ import annotations

from dataclasses import dataclass

from ...jobs import Job

REFERENCE = "on two idle CPU cores"
"""The machine of the numbers that hold before there is a job of one's own."""


@dataclass(frozen=True)
class Pace:
    """Seconds of the parts of a job.

    Args:
        step: of one image in one step. `rest`: of all that is no step: loading, previews and evaluation.
        by: where the numbers come from, for people.
    """

    step: float
    rest: float
    by: str

    def seconds(self, images: float, share: float = 1.0) -> float:
        """Of a job that sees `images` (steps × batch), with `share` of the evaluation that `rest` holds."""
        return self.step * images + self.rest * (1 + share) / 2  # about half of the rest grows with the evaluation


def pace_of(job: Job, batch: int, share: float = 1.0) -> Pace | None:
    """Of a finished job whose steps had `batch` images, and that made `share` of an evaluation; None if it tells nothing."""
    steps = job.progress()
    if not steps or not steps[-1].seconds:
        return None
    whole = job.seconds
    rest = max(0.0, whole - steps[-1].seconds) if whole else 0.3 * steps[-1].seconds
    rest = rest * 2 / (1 + share)  # of a whole evaluation, see `Pace.seconds`
    return Pace(steps[-1].seconds / steps[-1].steps / max(1, batch), rest, "going by your last run on this base")


def duration(seconds: float) -> str:
    """Seconds for people, as coarse as an estimate is.

    >>> duration(20), duration(80), duration(1000), duration(8000)
    ('under a minute', 'about 1 min', 'about 17 min', 'about 2.2 h')
    """
    if seconds < 45:
        return "under a minute"
    return f"about {max(1, round(seconds / 60))} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"

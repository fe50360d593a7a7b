"""Time estimates of jobs, from the user's last similar job or from a reference machine."""

from __future__ import annotations

from dataclasses import dataclass

from ...jobs import Job

REFERENCE = "on two idle CPU cores"
"""Reference machine of the estimates before the first job."""


@dataclass(frozen=True)
class Timing:
    """Measured seconds of the parts of a job.

    Args:
        step: per image and training step. `rest`: everything else: loading, previews and evaluation.
        source: origin of the measurement, shown to users.
    """

    step: float
    rest: float
    source: str

    def seconds(self, images: float, eval_share: float = 1.0) -> float:
        """Total seconds of a job that trains on `images` (steps × batch), with `eval_share` of the evaluation in `rest`."""
        return self.step * images + self.rest * (1 + eval_share) / 2  # about half of the rest scales with the evaluation


def measure_timing(job: Job, batch: int, eval_share: float = 1.0) -> Timing | None:
    """Timing of a finished job with `batch` images per step and `eval_share` of a full evaluation; None without data."""
    steps = job.progress()
    if not steps or not steps[-1].seconds:
        return None
    total = job.seconds
    rest = max(0.0, total - steps[-1].seconds) if total else 0.3 * steps[-1].seconds
    rest = rest * 2 / (1 + eval_share)  # for a full evaluation, see `Timing.seconds`
    return Timing(steps[-1].seconds / steps[-1].steps / max(1, batch), rest, "based on your last run with this base model")


def duration(seconds: float) -> str:
    """Formats seconds with the precision of an estimate.

    >>> duration(20), duration(80), duration(1000), duration(8000)
    ('under a minute', 'about 1 min', 'about 17 min', 'about 2.2 h')
    """
    if seconds < 45:
        return "under a minute"
    return f"about {max(1, round(seconds / 60))} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"

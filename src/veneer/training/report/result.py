"""How a training run ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        steps: steps done, resumed ones included.
        losses: mean loss of each of them.
        seconds: time spent in them, over all parts of the run.
        peak_memory_bytes: peak memory of this process, on its device.
        stopped: True if a signal or `Trainer.stop` ended the run before its last step.
        resumed_from: steps that a checkpoint brought; 0 for a fresh run.
        checkpoint: the newest checkpoint written or read, or None.
        warnings: what went wrong without ending the run, such as a checkpoint that did not fit on the disk.
    """

    steps: int
    losses: list[float]
    seconds: float
    peak_memory_bytes: int
    stopped: bool
    resumed_from: int = 0
    checkpoint: Path | None = None
    warnings: list[str] = field(default_factory=list)

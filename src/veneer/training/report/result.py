"""Result of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Args:
        steps: finished steps, including those before resuming.
        losses: mean loss of each step.
        seconds: training time of all steps.
        peak_memory_bytes: peak memory of this process, on its device.
        stopped: True if a signal or `Trainer.stop` ended the run before its last step.
        resumed_from: step of the checkpoint that the run resumed from; 0 for a new run.
        checkpoint: the newest checkpoint written or read, or None.
        warnings: problems that did not end the run, such as a checkpoint that could not be written.
    """

    steps: int
    losses: list[float]
    seconds: float
    peak_memory_bytes: int
    stopped: bool
    resumed_from: int = 0
    checkpoint: Path | None = None
    warnings: list[str] = field(default_factory=list)

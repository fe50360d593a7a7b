"""Plot of the training and validation loss of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from veneer.atomic_files import write_atomically

from .objective.validation_loss import ValidationScore
from .report.progress import Progress

LOSS_PLOT = "loss.png"


def write_loss_plot(path: Path, progress: Sequence[Progress], scores: Sequence[ValidationScore]) -> None:
    """Writes a PNG with the smoothed training loss and the validation loss, of all photos and of each concept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.plot([p.step for p in progress], [p.smoothed for p in progress], label="training, mean of 50 steps")
    steps = [score.step for score in scores]
    axis.plot(steps, [score.loss for score in scores], "o-", label="validation")
    concepts = list(dict.fromkeys(concept for score in scores for concept in score.by_concept))
    for concept in concepts if len(concepts) > 1 else ():
        axis.plot(steps, [score.by_concept.get(concept, float("nan")) for score in scores], ".--", label=f"validation, {concept}")
    axis.set(xlabel="step", ylabel="loss")
    axis.legend()
    axis.grid(alpha=0.3)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    write_atomically(path, data.getvalue())

"""Pictures of a run: the confusion matrix, the curves, and the worst mistakes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from veneer.training.loop.checkpoints import write_atomically

from ..train.epoch_selection import Epoch
from .metrics import Figures

GREY, BLUE, ORANGE = "#5f6368", "#1f6feb", "#d9730d"
SHOWN = 24


def write_confusion(figures: Figures, classes: Sequence[str], path: Path) -> None:
    """Rows are the true classes, as shares of their images; counts are written where there is room for them."""
    counts = torch.tensor(figures.confusion, dtype=torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    number = len(classes)
    side = min(14.0, 3.2 + 0.36 * number)
    figure, axes = panels(side + 0.8, side)
    shown = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    low, high = figures.interval
    interval = f"95 % interval {low:.1%} to {high:.1%}"
    figure.suptitle(f"accuracy {figures.accuracy:.1%}, {figures.pictures:,} test images\n{interval}", fontsize=10)
    size = max(3.0, min(9.0, 200 / max(number, 1)))
    axes.set_xticks(range(number), [_short(c) for c in classes], rotation=60, ha="right", fontsize=size)
    axes.set_yticks(range(number), [_short(c) for c in classes], fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if number <= 30:
        for row, column in counts.nonzero().tolist():
            color = "w" if shares[row, column] > 0.55 else "k"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=size, color=color)
    figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03, label="share of the true class")
    write_figure(figure, path)


def write_curves(losses: Sequence[float], epochs: Sequence[Epoch], best: Epoch, path: Path) -> None:
    """Training loss by step, validation loss and accuracy by epoch, and the epoch that was kept."""
    figure, (left, right) = panels(9.5, 3.6, columns=2)
    if losses:
        left.plot(range(1, len(losses) + 1), losses, color=GREY, alpha=0.25, linewidth=0.8)
        left.plot(range(1, len(losses) + 1), _smoothed(losses), color=GREY, label="training (mean of 20 steps)")
    steps = [e.step for e in epochs]
    left.plot(steps, [e.val_loss for e in epochs], color=BLUE, marker=".", label="validation")
    left.set(xlabel="step", ylabel="loss", title="loss")
    right.plot(steps, [e.val_accuracy for e in epochs], color=BLUE, marker=".", label="validation")
    right.set(xlabel="step", ylabel="accuracy", title="accuracy")
    for axes in (left, right):
        axes.axvline(best.step, color=ORANGE, linestyle="--", linewidth=1, label=f"kept: epoch {best.epoch}")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def write_mistakes(
    logits: Tensor, labels: Tensor, classes: Sequence[str], picture: Callable[[int], Image.Image], path: Path
) -> None:
    """The most confident mistakes, worst first, with the true and the predicted class.

    Args:
        picture: the image of a row of `logits`.
    """
    sure, answers = logits.double().softmax(1).max(1)
    wrong = [i for i in sure.argsort(descending=True, stable=True).tolist() if answers[i] != labels[i]]
    shown = wrong[:SHOWN]
    columns = 6 if len(shown) > 8 else 4 if len(shown) > 3 else 3
    rows = max(1, -(-len(shown) // columns))
    figure, grid = panels(1.75 * columns, 2.1 * rows + 0.5, columns=columns, rows=rows)
    cells = list(grid.flat)
    for cell in cells:
        cell.axis("off")
    for cell, i in zip(cells, shown, strict=False):
        seen = picture(i)
        seen.thumbnail((240, 240))
        cell.imshow(seen)
        true, answered = classes[int(labels[i])], classes[int(answers[i])]
        cell.set_title(f"{_short(answered)} {float(sure[i]):.0%}\nis {_short(true)}", fontsize=8)
    told = f"{len(wrong):,} of {len(labels):,} test images misclassified"
    figure.suptitle(told + (f"; the {len(shown)} most confident" if len(wrong) > len(shown) else ""), fontsize=10)
    write_figure(figure, path)


def panels(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def write_figure(figure: Any, path: Path) -> None:
    """A PNG, written whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomically(path, data.getvalue())


def _smoothed(values: Sequence[float], window: int = 20) -> list[float]:
    found = []
    for end in range(1, len(values) + 1):
        some = values[max(0, end - window) : end]
        found.append(sum(some) / len(some))
    return found


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"

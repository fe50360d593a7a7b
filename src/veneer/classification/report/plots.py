"""Plots of a run: the confusion matrix, the training curves, and the most confident mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from veneer.plot_file import blank, panels, write_figure

from ..train.epoch_selection import Epoch
from .metrics import ClassificationMetrics

GREY, BLUE, ORANGE = "#5f6368", "#1f6feb", "#d9730d"
MISTAKES = 24
CELL, SIDE, TITLE = (1.75, 2.1), 1.65, 0.5
"""Of an image grid, in inches: width and height of a cell, longest side of an image, and height of the title."""


def write_confusion(metrics: ClassificationMetrics, classes: Sequence[str], path: Path) -> None:
    """Plots the confusion matrix, normalized by true class; up to 30 classes the counts are written into the cells."""
    counts = torch.tensor(metrics.confusion, dtype=torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    number = len(classes)
    side = min(14.0, 3.2 + 0.36 * number)
    figure, axes = panels(side + 0.8, side)
    heatmap = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    low, high = metrics.interval
    interval = f"95 % interval {low:.1%} to {high:.1%}"
    figure.suptitle(f"accuracy {metrics.accuracy:.1%}, {metrics.images:,} test images\n{interval}", fontsize=10)
    size = max(3.0, min(9.0, 200 / max(number, 1)))
    axes.set_xticks(range(number), [shorten(c) for c in classes], rotation=60, ha="right", fontsize=size)
    axes.set_yticks(range(number), [shorten(c) for c in classes], fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if number <= 30:
        for row, column in counts.nonzero().tolist():
            color = "w" if shares[row, column] > 0.55 else "k"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=size, color=color)
    figure.colorbar(heatmap, ax=axes, fraction=0.046, pad=0.03, label="fraction of the true class")
    write_figure(figure, path)


def write_curves(losses: Sequence[float], epochs: Sequence[Epoch], best: Epoch, path: Path, metric: str = "accuracy") -> None:
    """Plots the training loss by step, validation loss and metric by epoch, and the selected epoch."""
    figure, (left, right) = panels(9.5, 3.6, columns=2)
    if losses:
        left.plot(range(1, len(losses) + 1), losses, color=GREY, alpha=0.25, linewidth=0.8)
        left.plot(range(1, len(losses) + 1), _smoothed(losses), color=GREY, label="training (mean of 20 steps)")
    steps = [e.step for e in epochs]
    left.plot(steps, [e.val_loss for e in epochs], color=BLUE, marker=".", label="validation")
    left.set(xlabel="step", ylabel="loss", title="loss")
    right.plot(steps, [e.val_accuracy for e in epochs], color=BLUE, marker=".", label="validation")
    right.set(xlabel="step", ylabel=metric, title=metric)
    for axes in (left, right):
        axes.axvline(best.step, color=ORANGE, linestyle="--", linewidth=1, label=f"selected: epoch {best.epoch}")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def write_mistakes(
    logits: Tensor, labels: Tensor, classes: Sequence[str], image: Callable[[int], Image.Image], path: Path
) -> None:
    """Plots the most confident mistakes, worst first, with the true and the predicted class.

    Args:
        image: returns the image of a row of `logits`.
    """
    confidence, predictions = logits.double().softmax(1).max(1)
    wrong = [i for i in confidence.argsort(descending=True, stable=True).tolist() if predictions[i] != labels[i]]
    worst = wrong[:MISTAKES]
    cells = []
    for i in worst:
        true, predicted = classes[int(labels[i])], classes[int(predictions[i])]
        cells.append((image(i), f"{shorten(predicted)} {float(confidence[i]):.0%}\nis {shorten(true)}"))
    title = f"{len(wrong):,} of {len(labels):,} test images misclassified"
    write_image_grid(cells, title + (f"; the {len(worst)} most confident" if len(wrong) > len(worst) else ""), path)


def write_image_grid(images: Sequence[tuple[Image.Image, str]], title: str, path: Path) -> None:
    """Plots images with a title each, and a title above them.

    All are in one axes: with an axes and a constrained layout for each image, a grid takes three times as long.
    """
    columns = 6 if len(images) > 8 else 4 if len(images) > 3 else 3
    rows = max(1, -(-len(images) // columns))
    figure, axes = blank(CELL[0] * columns, CELL[1] * rows + TITLE)
    for index, (thumbnail, text) in enumerate(images):
        row, column = divmod(index, columns)
        thumbnail.thumbnail((240, 240))
        x, bottom = CELL[0] * (column + 0.5), TITLE + CELL[1] * (row + 1)
        width, height = (SIDE * pixels / max(thumbnail.size) for pixels in thumbnail.size)
        y = bottom - SIDE / 2
        axes.imshow(thumbnail, extent=(x - width / 2, x + width / 2, y + height / 2, y - height / 2), aspect="auto")
        axes.text(x, y - height / 2 - 0.05, text, fontsize=8, ha="center", va="bottom")
    figure.suptitle(title, fontsize=10, y=1 - 0.1 / figure.get_figheight())
    write_figure(figure, path)


def _smoothed(values: Sequence[float], window: int = 20) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def shorten(name: str, most: int = 18) -> str:
    """The name, cut off with an ellipsis if it is longer than `most` characters."""
    return name if len(name) <= most else name[: most - 1] + "…"

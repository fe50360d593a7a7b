"""Plots of multi-label classification: average precision by class, and the most confident mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer.plot_file import panels, write_figure

from ..report.plots import BLUE, MISTAKES, ORANGE, shorten, write_image_grid
from .multi_label_metrics import THRESHOLD, MultiLabelMetrics
from .objective import Evaluation

MOST_CLASSES = 60
"""Classes in the plot; of more, those with the lowest average precision."""


def write_class_precision(metrics: MultiLabelMetrics, classes: Sequence[str], path: Path) -> None:
    """Plots the average precision of each class, lowest first, beside the share of the images that have it."""
    shares = metrics.targets.double().mean(0).tolist()
    rows = [(p, name, share) for p, name, share in zip(metrics.average_precision, classes, shares, strict=True) if p is not None]
    lowest = sorted(rows)[:MOST_CLASSES]
    figure, axes = panels(7.2, 1.8 + 0.24 * len(lowest))
    places = range(len(lowest))
    axes.barh(places, [p for p, _, _ in lowest], color=BLUE, label="average precision")
    axes.scatter([share for _, _, share in lowest], places, color=ORANGE, marker="|", s=90, zorder=3, label="random ranking")
    axes.set_yticks(places, [shorten(name) for _, name, _ in lowest], fontsize=8)
    axes.set(xlim=(0, 1), xlabel="average precision")
    axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    low, high = metrics.interval
    interval = f"95 % interval {low:.1%} to {high:.1%}"
    figure.suptitle(f"mean average precision {metrics.score:.1%}, {metrics.images:,} test images\n{interval}", fontsize=10)
    write_figure(figure, path)


def write_label_mistakes(evaluation: Evaluation, path: Path) -> None:
    """Plots the images with the most confident mistakes, worst first: a wrong label, or one that is missing."""
    probabilities, targets = evaluation.logits.double().sigmoid(), evaluation.targets > 0.5
    wrong = (probabilities >= THRESHOLD) != targets
    confidence, worst_class = ((probabilities - 0.5).abs() * wrong).max(1)
    images = [i for i in confidence.argsort(descending=True, stable=True).tolist() if bool(wrong[i].any())]
    cells = []
    for i in images[:MISTAKES]:
        c = int(worst_class[i])
        true = [name for name, has in zip(evaluation.classes, targets[i].tolist(), strict=True) if has]
        text = f"{'no ' if bool(targets[i, c]) else ''}{shorten(evaluation.classes[c])} {float(probabilities[i, c]):.0%}"
        cells.append((evaluation.image(i), f"{text}\nis {shorten(', '.join(true))}"))
    title = f"{len(images):,} of {len(targets):,} test images with a wrong or missing label"
    write_image_grid(cells, f"{title}; the {len(cells)} most confident" if len(images) > len(cells) else title, path)

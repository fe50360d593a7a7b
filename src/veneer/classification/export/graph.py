"""The computation graph of a classifier, with a dynamic batch dimension."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .class_weights import without_text_tower
from .export_format import ExportError, ExportSource


class ImageGraph(nn.Module):
    """Logits (n, classes) of `pixels` (n, 3, height, width).

    Args:
        model: the classifier. `mean`, `std`: of the normalization that the graph applies, or None for pixels that are normalized.
    """

    def __init__(self, model: nn.Module, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.normalizes = mean is not None
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pixels: Tensor) -> Tensor:
        """The logits."""
        if self.normalizes:
            pixels = (pixels - self.get_buffer("mean")) / self.get_buffer("std")
        logits: Tensor = self.model(pixels)
        return logits


def graph_module(source: ExportSource) -> ImageGraph:
    """The module that is exported."""
    if not source.include_normalization:
        return ImageGraph(source.model).eval()
    mean, std = (torch.tensor(source.data[name], dtype=torch.float32).view(1, 3, 1, 1) for name in ("mean", "std"))
    return ImageGraph(source.model, mean, std).eval()


def export_graph(source: ExportSource, form: str) -> torch.export.ExportedProgram:
    """The exported program with the input `pixels`, whose first dimension is dynamic.

    Args:
        form: name of the format, for the error.
    Raises:
        ExportError: torch cannot export the model or an adapter.
    """
    pixels = torch.zeros(2, *source.data["input_size"])
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), without_text_tower(source.model), ignored_warnings():
        try:
            return torch.export.export(graph_module(source), (pixels,), dynamic_shapes={"pixels": {0: batch}}, strict=False)
        except Exception as error:  # torch's exporter raises many kinds
            raise graph_error(source, form, error) from error


def graph_error(source: ExportSource, form: str, error: Exception) -> ExportError:
    """The error of a model that torch cannot export."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    adapters = ", ".join(a.method.name for a in source.attached if not a.merged)
    message = (
        f"{form}: torch cannot export {source.classifier.name}{f' with {adapters}' if adapters else ''}: {reason} "
        "Use `veneer predict`, or a method that can be merged into the weights."
    )
    return ExportError(message, where=form, given=reason)


@contextlib.contextmanager
def ignored_warnings() -> Iterator[None]:
    """Ignores warnings of torch's exporters about torch's own code."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield

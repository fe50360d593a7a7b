"""What an export format is: the models that it accepts, how it is written, and how it runs without veneer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.injection import Attachment, VeneerError, attachments

from ..models.classifier import Classifier
from ..objectives.objective import Objective
from ..objectives.single_label import SINGLE_LABEL

Run = Callable[[Tensor], Tensor]
"""Logits (n, classes) of pixels (n, 3, height, width)."""


class ExportError(VeneerError):
    """A classifier that cannot be exported to a format, or whose exported logits differ.

    `where` is the format, `given` the reason: an attachment's name, the kind of model, or the largest difference of the logits.
    `expected` has the names of the formats that work, or the allowed difference.
    """


@dataclass(frozen=True)
class ExportSource:
    """A classifier to export.

    Args:
        classifier: in float32, on the CPU. `data`: preprocessing in timm's data config format, as prediction uses it.
        include_normalization: the graph takes pixels in 0 to 1 and normalizes them.
        objective: of its training.
    """

    classifier: Classifier
    data: Mapping[str, Any]
    include_normalization: bool = False
    objective: Objective = SINGLE_LABEL

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.classifier.model

    @property
    def attached(self) -> Sequence[Attachment]:
        """Attachments of the model, in the order of attaching."""
        return attachments(self.model)

    def preprocessing(self) -> dict[str, Any]:
        """`data` as JSON values, without timm's other entries."""
        names = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
        return {name: list(v) if isinstance(v := self.data[name], tuple) else v for name in names}


@dataclass(frozen=True)
class ExportFormat:
    """One export format.

    Args:
        name: value of `--to`. `suffix`: of the file, or "" for a folder.
        libraries: modules that it needs.
        is_graph: True for a computation graph, which may contain adapters; False for merged weights of an architecture.
        rejection: why a model is not supported, or "".
        write: writes the file or folder, and whatever lies beside it. `load`: opens it without veneer.
    """

    name: str
    suffix: str
    libraries: tuple[str, ...]
    is_graph: bool
    rejection: Callable[[Classifier], str]
    write: Callable[[ExportSource, Path], None]
    load: Callable[[Path], Run]

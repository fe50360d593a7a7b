"""Labels and preprocessing of an exported classifier."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from .export_format import ExportSource

KEY = "veneer"
"""Key of the metadata in ONNX files, and stem of its file in `.pt2` archives."""


def describe(source: ExportSource) -> dict[str, Any]:
    """What reproduces a prediction beside the weights: labels and preprocessing, in timm's terms."""
    name = source.classifier.name
    return {
        "veneer": version("veneer"),
        "model": Path(name).name if Path(name).is_dir() else name,
        "methods": [attachment.method.name for attachment in source.attached],
        "label_names": list(source.classifier.classes),
        **source.objective.metadata,
        "preprocessing": source.preprocessing(),
    }


def graph_metadata(source: ExportSource) -> dict[str, Any]:
    """`describe`, and the input and output of a graph."""
    inside = source.include_normalization
    return {
        **describe(source),
        "input": {
            "name": "pixels",
            "shape": ["batch", *source.preprocessing()["input_size"]],
            "dtype": "float32",
            "range": "0 to 1" if inside else "normalized: (pixels - mean) / std, with pixels in 0 to 1",
        },
        "output": {"name": "logits", "shape": ["batch", len(source.classifier.classes)], "dtype": "float32"},
        "includes_normalization": inside,
    }

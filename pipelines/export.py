"""Export a trained classifier to a format that other tools load without veneer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from veneer.classification.export.export_classifier import FORMATS, ExportReport, export_classifier
from veneer.classification.export.export_format import ExportSource
from veneer.classification.predict import open_predictor
from veneer.injection import OptionError

__all__ = ["ExportConfig", "export"]

To = Literal["timm", "onnx", "torch-export", "open_clip"]


@dataclass(frozen=True)
class ExportConfig:
    """Configuration of `veneer export` and its defaults.

    Args:
        folder: run folder of `veneer transfer`.
        to: format; required: `timm` and `open_clip` are folders with the merged weights; `onnx` and `torch-export` are graphs
            with a dynamic batch size, for methods that cannot be merged as well.
        out: the new file, or for `timm` and `open_clip` the new folder (default: in the run folder, named after the format).
        include_normalization: let the graph of `onnx` or `torch-export` normalize: it takes pixels in 0 to 1 instead of
            normalized ones.
    """

    folder: Path
    to: To | None = None
    out: Path | None = None
    include_normalization: bool = False


def export(config: ExportConfig) -> list[str]:
    """Writes the classifier, opens the result without veneer, and compares the logits; nothing is left if they differ.

    Returns:
        Lines with the files, the largest difference of a logit, and how to load the result.
    Raises:
        VeneerError: `to` is missing; no finished run in the folder; `out` exists; or the format does not support the model or a
            method of the run.
    """
    if config.to is None:
        message = f"export: --to is missing; expected one of {', '.join(get_args(To))}."
        raise OptionError(message, option="to", method="export", expected=get_args(To))
    predictor = open_predictor(config.folder)
    source = ExportSource(predictor.classifier, predictor.view.config, config.include_normalization, predictor.objective)
    out = config.out or _default_path(config.folder, config.to)
    return _lines(config.to, export_classifier(source, config.to, out))


def _default_path(folder: Path, to: To) -> Path:
    suffix = FORMATS[to].suffix
    return folder / (f"classifier{suffix}" if suffix else to)


def _lines(to: To, report: ExportReport) -> list[str]:
    compared = f"logits compared: largest difference {report.difference:.2g}, largest logit {report.scale:.2g}"
    return [*map(str, report.files), compared, f"load it with: {_load_call(to, report.files[0])}"]


def _load_call(to: To, path: Path) -> str:
    calls = {
        "timm": f"timm.create_model({f'local-dir:{path}'!r}, pretrained=True)",
        "open_clip": f"open_clip.create_model({f'local-dir:{path}'!r})",
        "onnx": f"onnxruntime.InferenceSession({str(path)!r})",
        "torch-export": f"torch.export.load({str(path)!r}).module()",
    }
    return calls[to]

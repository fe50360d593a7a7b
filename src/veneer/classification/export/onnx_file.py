"""An ONNX file of a classifier, with its labels and preprocessing in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .export_format import ExportFormat, ExportSource, Run
from .graph import export_graph, graph_error, ignored_warnings
from .metadata import KEY, graph_metadata


def _write(source: ExportSource, file: Path) -> None:
    """The file, and `NAME.data` beside it if the weights exceed ONNX's limit of 2 GB."""
    program = export_graph(source, "onnx")
    with ignored_warnings():
        try:
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["pixels"], output_names=["logits"],
                dynamic_shapes={"pixels": {0: "batch"}},
            )  # fmt: skip
        except Exception as error:  # the converter raises many kinds
            raise graph_error(source, "onnx", error) from error
        assert exported is not None
        exported.model.metadata_props[KEY] = json.dumps(graph_metadata(source), ensure_ascii=False)
        exported.save(file)


def _load(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])

    return run


LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
FORMAT = ExportFormat("onnx", ".onnx", LIBRARIES, True, lambda classifier: "", _write, _load)

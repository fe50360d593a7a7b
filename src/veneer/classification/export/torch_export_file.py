"""A `.pt2` file with the exported program of a classifier, for `torch.export.load`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .export_format import ExportFormat, ExportSource, Run
from .graph import export_graph, ignored_warnings
from .metadata import KEY, graph_metadata


def _write(source: ExportSource, file: Path) -> None:
    program = export_graph(source, "torch-export")
    metadata = json.dumps(graph_metadata(source), ensure_ascii=False)
    with ignored_warnings():
        torch.export.save(program, file, extra_files={f"{KEY}.json": metadata})


def _load(file: Path) -> Run:
    with ignored_warnings():
        module = torch.export.load(file).module()

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        logits: Tensor = module(pixels)
        return logits

    return run


FORMAT = ExportFormat("torch-export", ".pt2", (), True, lambda classifier: "", _write, _load)

"""The benchmark of memory on a small model: weights layer by layer, one step, and the row of the table."""

from __future__ import annotations

import math
import multiprocessing
import weakref
from concurrent.futures import ProcessPoolExecutor

import pytest
from torch import nn
from veneer.pipelines.memory_benchmark import predict, row

from tests.base_models.quantized import dit, layers, needs
from veneer.base_models import quantize_model
from veneer.benchmarks import full_size
from veneer.benchmarks.full_size import CASES, FullSizeCase, materialize, run_case

BUNDLED = FullSizeCase("bundled", 128, "float32", rank=4)


@pytest.mark.parametrize("kind", [None, pytest.param("nf4", marks=needs("nf4")), pytest.param("int8", marks=needs("int8"))])
def test_weights_are_those_of_a_quantized_model(kind):
    model, expected = dit().to("meta"), dit()
    materialize(model, kind)
    if kind:
        quantize_model(expected, kind)
    assert layers(model) == layers(expected)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    shapes = [(name, tuple(p.shape), p.dtype) for name, p in expected.named_parameters()]
    assert [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()] == shapes


@needs("nf4")
def test_one_float_layer_exists_at_a_time(monkeypatch):
    floats, most = weakref.WeakSet[nn.Linear](), 0
    quantize = full_size.quantize_linear

    def watch(linear, kind):
        nonlocal most
        floats.add(linear)
        most = max(most, len(floats))
        return quantize(linear, kind)

    monkeypatch.setattr(full_size, "quantize_linear", watch)
    model = dit().to("meta")
    materialize(model, "nf4")
    assert len(layers(model)) > 2
    assert most == 1


def test_a_step_of_the_bundled_model():
    """In a process of its own, which has no freed memory that it could reuse."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        result = process.submit(run_case, BUNDLED).result()
    assert math.isfinite(result.loss)
    assert result.step >= result.weights > 0
    assert result.seconds > 0
    prediction = predict(BUNDLED)
    cells = row("bundled", prediction, result).split("|")[1:-1]
    assert len(cells) == 7
    assert float(cells[4]) == pytest.approx(result.step / prediction.phases(offloads=True)["training"], abs=1e-3)


def test_cases_are_those_of_the_page():
    assert {(c.base, c.resolution, c.quantize, c.gradient_checkpointing) for c in CASES.values()} == {
        ("sd15", 512, None, False), ("sdxl", 1024, None, True), ("sd35", 512, "int8", False), ("flux", 256, "nf4", True)
    }  # fmt: skip

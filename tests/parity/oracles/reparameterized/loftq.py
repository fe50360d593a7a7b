"""LoftQ's quantized weight and correction beside its authors' alternating decomposition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from scipy.stats import norm
from torch import Tensor

from tests.parity.measure import Row, largest_difference, randn
from tests.parity.oracle import Repository
from veneer.base_models.quantization import KINDS
from veneer.base_models.quantized_linear import decompose
from veneer.injection.quantized_weight import float_weight

ORACLE = Repository("yxli2123/LoftQ", "ae33fd4fd05fd4ba146555cd77c13d307eb4e9b3", third_party=("lora",))
METHODS = ("lora",)
RANK, ITERATIONS = 5, 4


def rows() -> list[Row]:
    """Two layers, from one iteration to four."""
    theirs, pairs = _decomposition(), []
    for seed, shape in enumerate([(48, 128), (96, 64)]):
        linear = torch.nn.Linear(shape[1], shape[0])
        linear.weight.data = randn(*shape, seed=seed).float()
        for iterations in range(1, ITERATIONS + 1):
            layer, (down, up) = decompose(linear, replace(KINDS["nf4"], loftq=(RANK, iterations)))
            weight, product = theirs(linear.weight.detach(), iterations)
            pairs += [(float_weight(layer), weight), (up @ down, product)]
    return [Row("lora", "LoftQ, nf4: quantized weights, B A of 1 to 4 iterations", largest_difference(pairs), "float32")]


def _decomposition() -> Any:
    silent: dict[str, Any] = {"print": lambda *text: None}
    code = ORACLE.definitions(
        "glue/utils_qaunt.py", "weight_quant_fn", "create_normal_map", "quantize_tensor", "quant_nf4_block", norm=norm, **silent
    )
    names = ("low_rank_decomposition", "quant_first_iter")
    step = ORACLE.definitions("glue/utils.py", *names, weight_quant_fn=code.weight_quant_fn).quant_first_iter

    def run(weight: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        left: Any = 0
        right: Any = 0
        for _ in range(iterations):
            weight, left, right, quantized, _ = step(weight, left, right, RANK, 4, "normal_float")
        return quantized, left @ right

    return run

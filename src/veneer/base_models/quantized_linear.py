"""Quantized linear layers: one function per library, each computed by the library itself.

Every function takes a float `nn.Linear` and returns a layer that computes y = Ŵ x + b with the same bias, where Ŵ is W rounded.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.injection.attachment.fingerprint import sign_bits
from veneer.injection.quantized_weight import RECORD, QuantizationRecord, float_weight

Convert = Callable[[nn.Linear, torch.dtype], nn.Linear]


@dataclass(frozen=True)
class Kind:
    """A quantization of linear layers.

    Args:
        name: as in `--quantize`. `library`: name of its module.
        block: number of weights of a row with one scale; the input width must be a multiple of it. 1 for one scale per row.
        bits: size of a weight without its scales.
        convert: quantizes a layer for a compute dtype. `options`: what else identifies the quantization, as JSON values.
        autocast: whether layers work under autocast.
        loftq: rank and iterations of the low-rank correction that is computed with each layer, or None; see `decompose`.
    """

    name: str
    library: str
    block: int
    bits: int
    convert: Convert
    options: Mapping[str, Any] = field(default_factory=dict)
    autocast: bool = True
    loftq: tuple[int, int] | None = None

    def recipe(self, dtype: torch.dtype) -> dict[str, Any]:
        """JSON values that identify the quantization."""
        correction = {"loftq": list(self.loftq)} if self.loftq else {}
        return {"kind": self.name, **self.options, **correction, "compute_dtype": str(dtype).removeprefix("torch.")}


def quantize_linear(linear: nn.Linear, kind: Kind) -> nn.Linear:
    """A quantized layer in place of a float one, which computes in the dtype of the float weight.

    The new layer has a record of its quantization, from which the fingerprint of the float base model is computed.
    """
    weight = linear.weight.detach()
    made, correction = (kind.convert(linear, weight.dtype), None) if kind.loftq is None else decompose(linear, kind)
    made.requires_grad_(False).train(linear.training)

    def requantize(changed: Tensor) -> nn.Parameter:
        layer = nn.Linear(linear_shape[1], linear_shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(changed.detach().to(dtype), requires_grad=False)
        parameter: Any = kind.convert(layer, dtype).weight
        parameter.requires_grad_(False)
        return cast(nn.Parameter, parameter)

    linear_shape, dtype = tuple(weight.shape), weight.dtype
    made.__dict__[RECORD] = QuantizationRecord(kind.recipe(dtype), linear_shape, sign_bits(weight), requantize, correction)
    return made


@torch.no_grad()
def decompose(linear: nn.Linear, kind: Kind) -> tuple[nn.Linear, tuple[Tensor, Tensor]]:
    """LoftQ: W ≈ Ŵ + B A, by alternately quantizing W − B A, from B A = 0 on, and decomposing W − Ŵ.

    Args:
        kind: with `loftq`, the rank r of B A, at most that of W, and the number of iterations.
    Returns:
        The quantized layer, A = √Σ_r V_rᵀ (r, d_in) and B = U_r √Σ_r (d_out, r) for W − Ŵ = U Σ Vᵀ, in float32 or better.

    Source: Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, ICLR 2024, algorithm 1.
    """
    assert kind.loftq is not None
    (rank, iterations), dtype = kind.loftq, linear.weight.dtype
    whole = linear.weight.detach().to(torch.promote_types(dtype, torch.float32))
    source, rest = linear, whole
    for iteration in range(iterations):
        if iteration:
            source = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            source.weight, source.bias = nn.Parameter(rest.to(dtype), requires_grad=False), linear.bias
        made = kind.convert(source, dtype)
        U, S, Vh = torch.linalg.svd(whole - float_weight(made).to(whole), full_matrices=False)
        root = S[:rank].sqrt()
        down, up = root[:, None] * Vh[:rank], U[:, :rank] * root
        rest = whole - up @ down
    return made, (down, up)


def four_bits(linear: nn.Linear, dtype: torch.dtype, kind: str, double: bool) -> nn.Linear:
    """bitsandbytes' 4-bit layer, `nf4` or `fp4` in blocks of 64; with `double`, the scales are quantized to 8 bits as well.

    Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023, section 3.
    """
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    made = bnb.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, dtype, double, kind, device="meta")
    made.support_avx512bf16_for_cpu = False  # else evaluation repacks the weight in place, with other values
    made.weight = bnb.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type=kind, blocksize=64, compress_statistics=double
    ).to(linear.weight.device)
    made.bias = linear.bias
    return made


def eight_bits(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """bitsandbytes' LLM.int8(): rows of 8-bit integers.

    The layer's inputs are cast to float16 and quantized as well, except outliers: on a GPU always, on a CPU in evaluation mode.

    Source: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, NeurIPS 2022.
    """
    from .int8_linear import MovableLinear8bitLt

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)
    made: Any = MovableLinear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    weight: Any = type(made.weight)(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    made.weight = weight.to(linear.weight.device)
    made.bias = linear.bias
    return made


def _is_no_cast(record: logging.LogRecord) -> bool:
    """False for bitsandbytes' remark in every forward pass that it casts inputs of other dtypes to float16."""
    return "inputs will be cast" not in record.getMessage()


def torchao_layer(linear: nn.Linear, dtype: torch.dtype, kind: str) -> nn.Linear:
    """torchao's weight-only quantization, `int8` or `float8` with a scale per row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the import, about optional extensions
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    configs = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}
    made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight, made.bias = nn.Parameter(linear.weight.detach(), requires_grad=False), linear.bias
    quantize_(made, configs[kind]())
    return made


def quanto_layer(linear: nn.Linear, dtype: torch.dtype, kind: str) -> nn.Linear:
    """optimum-quanto's layer: `qint8` with a scale per row, `qint4` with a scale and a shift per group of at most 128 weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.quanto import QLinear, qint4, qint8

        unpack_in_torch()
    made: Any = QLinear.from_module(linear, weights={"qint4": qint4, "qint8": qint8}[kind])
    made.freeze()
    return made


@functools.cache
def unpack_in_torch() -> torch.library.Library:
    """Replaces the CPU kernel of `quanto::unpack` by operations of PyTorch, with equal results.

    optimum-quanto compiles its own at first use, which takes a minute and needs a C++ compiler.
    """

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    library = torch.library.Library("quanto", "IMPL", "CPU")
    library.impl("unpack", unpack, allow_override=True)
    return library


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *(
            Kind(
                f"{name}{'-dq' if double else ''}",
                "bitsandbytes",
                64,
                4,
                functools.partial(four_bits, kind=name, double=double),
                {"block": 64, "double_quantization": double},
            )
            for name in ("nf4", "fp4")
            for double in (False, True)
        ),
        Kind("int8", "bitsandbytes", 1, 8, eight_bits, {"threshold": 6.0}),
        Kind("int8-torchao", "torchao", 1, 8, functools.partial(torchao_layer, kind="int8")),
        Kind("fp8", "torchao", 1, 8, functools.partial(torchao_layer, kind="float8")),
        Kind("int4", "optimum", 1, 4, functools.partial(quanto_layer, kind="qint4"), {"block": 128}, autocast=False),
        Kind("int8-quanto", "optimum", 1, 8, functools.partial(quanto_layer, kind="qint8"), autocast=False),
    )
}
"""Name to quantization, as in `--quantize`."""

"""LoRA initialized to the correction of a quantized weight (LoftQ): alternating quantization and decomposition, slices, files."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.base_models.quantized import dit
from tests.raising import raises
from veneer.base_models import KINDS, quantize_model
from veneer.base_models.quantization import parse_quantize
from veneer.base_models.quantized_linear import quantize_linear
from veneer.hosts.diffusers_dit import DiffusersDiT
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.quantized_weight import float_weight, quantization_of, record_of
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank.lora import LoRA

bnb = pytest.importorskip("bitsandbytes.functional")


def rounded(weight: Tensor) -> Tensor:
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def truncated(weight: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 96).requires_grad_(False)


def test_quantization_and_decomposition_alternate() -> None:
    """Against the loop of the paper's algorithm, whose first iteration is the plain quantization."""
    errors = []
    for iterations in (1, 2):
        layer = linear()
        product = torch.zeros_like(layer.weight)
        for _ in range(iterations):
            expected = rounded(layer.weight - product)
            product = truncated(layer.weight - expected, 8)
        made = quantize_linear(copy.deepcopy(layer), replace(KINDS["nf4"], loftq=(8, iterations)))
        record = record_of(made)
        assert record is not None
        assert record.correction is not None
        down, up = record.correction
        same = torch.isclose(float_weight(made), expected).float().mean()  # later, rounding of the product may change a level
        assert same == 1 if iterations == 1 else same > 0.995
        torch.testing.assert_close(up @ down, product, rtol=0, atol=1e-6 if iterations == 1 else 2e-3)
        torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-3, atol=1e-5)  # both have the roots of the singular values
        errors.append(float((layer.weight - float_weight(made) - up @ down).norm()))
        assert errors[-1] == pytest.approx(float((layer.weight - expected - product).norm()), rel=1e-3)
        assert record.requantize(layer.weight).shape == made.weight.shape
        assert record.recipe["loftq"] == [8, iterations]
    plain = linear()
    assert errors[1] < errors[0] < (plain.weight - rounded(plain.weight)).norm()


def test_a_slice_of_a_fused_weight_gets_its_rows() -> None:
    made = quantize_linear(linear(), replace(KINDS["nf4"], loftq=(8, 1)))
    record = record_of(made)
    assert record is not None
    assert record.correction is not None
    site = WeightSite(name="v", role="attn.v", path="0", d_out=32, d_in=128, rows=(64, 96))
    adapter = LoRA(rank=4, alpha=12.0, init="loftq").build(site)
    adapter.enter(nn.Sequential(made))
    down, up = record.correction
    torch.testing.assert_close(adapter.scaling * adapter.up @ adapter.down, up[64:, :4] @ down[:4])


def test_a_quantized_transformer_is_corrected(tmp_path: Path) -> None:
    """The outputs are nearer to those of the float model; the file restores them, and has no record of the correction."""
    host, model = DiffusersDiT(), dit()
    sample = {key: value[:1] if isinstance(value, Tensor) else value for key, value in host.sample(model).items()}
    exact = model(**sample)[0]
    quantize_model(model, "nf4+loftq8x2")
    assert (quantization_of(model) or {})["loftq"] == [8, 2]
    other, before = copy.deepcopy(model), model(**sample)[0]
    with raises(OptionError, method="lora", option="init", given=8, expected=9):
        attach(model, "lora", rank=9, init="loftq", where="attn.{q,k,v,out}")
    tuned = attach(model, "lora", rank=8, alpha=4.0, init="loftq", where="attn.{q,k,v,out} mlp.{in,out}")
    got = model(**sample)[0]
    assert (got - exact).norm() < 0.9 * (before - exact).norm()
    veneer.load(other, tuned.save(tmp_path / "x"))
    assert torch.equal(other(**sample)[0], got)
    tuned.detach()
    assert torch.equal(model(**sample)[0], before)


def test_a_base_of_another_quantization_is_noted(tmp_path: Path) -> None:
    """The correction belongs to one quantization: on any other base, with it or without, the load report says so."""
    model = dit()
    quantize_model(model, "nf4+loftq8x2")
    file = attach(model, "lora", rank=8, init="loftq", where="attn.{q,k,v,out}").save(tmp_path / "x")
    for kind, noted in (("nf4+loftq8x2", False), ("nf4+loftq8x1", True), ("nf4", True), (None, True)):
        other = dit()
        if kind is not None:
            quantize_model(other, kind)
        notes = [note for note in veneer.load(other, file).loaded.notes if "nf4+loftq8x2" in note]
        assert bool(notes) == noted, kind
        if noted:
            assert (kind or "float") in notes[0]


def test_names_of_kinds() -> None:
    kinds = parse_quantize({"transformer": "nf4+loftq16", "unet": "fp4-dq+loftq4x12"})
    assert [(kind.name, kind.loftq) for kind in kinds.values()] == [("nf4", (16, 5)), ("fp4-dq", (4, 12))]  # type: ignore[union-attr]
    for wrong in ("nf4+loftq0", "nf4+loftq", "nf4+", "nf4+loftq4x0", "none+loftq4"):
        with raises(OptionError, option="quantize", given=wrong, expected=tuple(KINDS)):
            parse_quantize(wrong)


def test_rejections() -> None:
    float_layer = nn.Sequential(linear())
    site = WeightSite(name="l", role="l", path="0", d_out=96, d_in=128)
    with raises(OptionError, method="lora", option="init", where="l", given=0, expected=4):
        LoRA(rank=4, init="loftq").build(site).enter(float_layer)
    with raises(OptionError, method="lora", option="rank", given=97, expected=96):
        LoRA(rank=97, init="loftq").build(site)

"""Parts of a conversion: tensors that become parameters, fused layers computed when read, and the comparison of ΔW."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.formats.cases import fill
from tests.raising import raises
from veneer import base_models
from veneer.formats import convert, formats, read
from veneer.formats._core.delta_comparison import compare
from veneer.formats._core.format import Options
from veneer.formats._core.lora_writer import LayerTensors
from veneer.formats._names import kohya_fused
from veneer.formats._names.kohya_fused import LoRAFactors, split_factors
from veneer.injection import SaveError, attach
from veneer.injection.sites import WeightSite
from veneer.testing.pipelines import tiny_pipeline


def test_assigned_tensors_are_the_parameters_themselves() -> None:
    lora = attach(tiny_pipeline("sd"), "lora", where="attn.q", rank=2)
    state = {key: torch.randn(t.shape).to(torch.float16) for key, t in lora.state_dict().items()}
    report = lora.load_state_dict(state, assign=True)
    assert report.clean
    for key, parameter in lora.named_parameters():
        assert parameter.dtype == torch.float16
        assert parameter.data_ptr() == state[key].data_ptr()
    lora.load_state_dict({key: t + 1 for key, t in state.items()})
    assert all(torch.equal(t, state[key]) for key, t in lora.state_dict().items())  # copied in place, in their dtype


def test_a_file_is_loaded_without_a_copy_only_on_request(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    lora = fill(attach(pipe, "lora", where="attn.q", rank=2))
    path = formats.get("kohya")().save(lora, tmp_path / "a")
    lora.detach()
    for assign in (True, False):
        file = read(path)
        (loaded,) = formats.get("kohya")().load(pipe, file, Options(assign=assign))
        starts = {file.mapped.tensor(name).data_ptr() for name in file.shapes}  # type: ignore[union-attr]
        assert all((p.data_ptr() in starts) == assign for p in loaded.parameters())
        loaded.detach()


def fused(sites: int, rank: int) -> tuple[kohya_fused.NamedLayer, LoRAFactors]:
    """A fused layer whose slices each have `rank` components of their own."""
    layer = kohya_fused.NamedLayer(
        ("x",),
        tuple(
            WeightSite(name=f"s{i}", role="attn.q", path=f"s{i}", kind="linear", d_out=4, d_in=5, tower="dit")
            for i in range(sites)
        ),
    )
    up = torch.block_diag(*(torch.randn(4, rank) for _ in range(sites)))
    return layer, LoRAFactors(torch.randn(sites * rank, 5), up, 1.0)


def test_contiguous_components_of_a_slice_are_views() -> None:
    layer, pair = fused(3, 2)
    for i, (_, low) in enumerate(split_factors(SimpleNamespace(path="x"), "x", layer, pair)):  # type: ignore[arg-type]
        assert low.down.untyped_storage().data_ptr() == pair.down.untyped_storage().data_ptr()
        assert torch.equal(low.down, pair.down[2 * i : 2 * i + 2])
        assert torch.equal(low.up, pair.up[4 * i : 4 * i + 4, 2 * i : 2 * i + 2])


def test_scattered_components_of_a_slice_are_selected() -> None:
    layer, pair = fused(2, 3)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    mixed = LoRAFactors(pair.down[order], pair.up[:, order], 1.0)
    for i, (_, low) in enumerate(split_factors(SimpleNamespace(path="x"), "x", layer, mixed)):  # type: ignore[arg-type]
        assert low.down.shape == (3, 5)
        assert torch.equal(low.up @ low.down, (mixed.up @ mixed.down)[4 * i : 4 * i + 4])


def test_only_one_layer_of_a_file_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[str] = []

    def merge(place: Any, adapters: Any) -> LoRAFactors:
        merged.append(place)
        return LoRAFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0)

    monkeypatch.setattr("veneer.formats._core.lora_writer.merge_adapters", merge)
    layers: Any = {"a": ("a", {}), "b": ("b", {})}
    tensors = LayerTensors(layers, lambda pair: {"down": pair.down, "up": pair.up}, {"token": torch.zeros(1)})
    assert list(tensors) == ["token", "a.down", "a.up", "b.down", "b.up"]
    assert len(tensors) == 5
    assert [tuple(t.shape) for t in tensors.values()] == [(1,), (2, 3), (4, 2), (2, 3), (4, 2)]
    assert merged == ["a", "b"]
    tensors["a.up"], tensors["a.down"]
    assert merged == ["a", "b", "a"]


@pytest.mark.parametrize("change", ["alpha", "values", "sites"])
def test_adapters_that_differ_in_one_respect_are_not_equal(change: str) -> None:
    """Also if all their tensors are the same."""
    pipe = tiny_pipeline("sd")
    options: dict[str, Any] = {"where": ["attn.q", "attn.k"], "rank": 2, "alpha": 2.0}
    lora = fill(attach(pipe, "lora", **options))
    options |= {"alpha": {"alpha": 2.01}.get(change, 2.0), "where": ["attn.q"] if change == "sites" else options["where"]}
    other = attach(pipe, "lora", **options)
    state = {key: t for key, t in lora.state_dict().items() if key in other.state_dict()}
    key = next(iter(state))
    state[key] = state[key] * 1.01 if change == "values" else state[key]
    other.load_state_dict(state)
    with raises(SaveError, file=Path("x")):
        compare([lora], [other], Path("x"))
    assert compare([lora], [lora], Path("x")) == (len(lora.parts), 0.0)


def test_equal_updates_with_other_factors_are_equal() -> None:
    pipe = tiny_pipeline("sd")
    lora = fill(attach(pipe, "lora", where="attn.q", rank=2))
    other = attach(pipe, "lora", where="attn.q", rank=2)
    other.load_state_dict({key: t * 3 if key.endswith("up") else t / 3 for key, t in lora.state_dict().items()})
    count, difference = compare([lora], [other], Path("x"))
    assert count == len(lora.parts)
    assert 0 < difference < 1e-6


def test_the_parameters_of_a_half_precision_file_stay_half(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 1152).half(), f"{name}.lora_B.weight": torch.randn(1152, 2).half()}
    save_file(tensors, tmp_path / "a.safetensors")
    converted = convert(base_models.architecture("dit"), tmp_path / "a.safetensors", "native", tmp_path / "b")
    assert converted.weights == 1
    assert {t.dtype for t in read(converted.files[0]).tensors().values()} == {torch.float16}

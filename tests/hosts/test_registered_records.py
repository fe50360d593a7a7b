"""Records of diffusion transformers of other packages, registered in this process: attach, conformance, and what is rejected."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests.raising import raises
from veneer import attach, transformer_records
from veneer.hosts.diffusers_dit import DiffusersDiT
from veneer.injection.errors import UnknownName, UnsupportedSite, VeneerError
from veneer.testing import check_host
from veneer.testing.suite import HOST_CHECKS

PACKAGE = Path(__file__).parents[1] / "example_package"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The record of the example package, which is not installed here."""
    monkeypatch.syspath_prepend(PACKAGE)
    return importlib.import_module("veneer_example.clay_record").RECORD


@pytest.fixture
def clay(example: Any) -> Iterator[Any]:
    transformer_records.register("clay", example)
    yield importlib.import_module("veneer_example.clay").ClayTransformer
    transformer_records.unregister("clay")


def test_a_record_alone_makes_a_model_attachable(clay: Any) -> None:
    assert "clay" in transformer_records.names()
    model = clay().eval()
    inputs = DiffusersDiT().sample(model)
    before = model(**inputs)
    lora = attach(model, "lora", where=("attn.{q,v}", "mlp"), rank=2)
    assert len(lora.parts) == 8
    assert torch.equal(model(**inputs), before)
    model(**inputs).square().mean().backward()
    torch.optim.SGD(lora.parameters(), 1.0).step()
    assert not torch.allclose(model(**inputs), before)


def test_its_small_model_conforms(clay: Any) -> None:
    records = check_host("diffusers_dit", models=("clay",))
    assert {record.model for record in records} == {"clay"}
    assert len(records) == len(HOST_CHECKS)
    assert not records.failures, records
    with raises(UnknownName, name="marble", kind="model"):
        check_host("diffusers_dit", models=("marble",))


def test_without_its_record_it_has_no_host(example: Any) -> None:
    model = importlib.import_module("veneer_example.clay").ClayTransformer()
    assert "clay" not in transformer_records.names()
    assert DiffusersDiT().record(model) is None
    with pytest.raises(UnsupportedSite):
        attach(model, "lora", where="attn")


def test_a_class_belongs_to_its_own_record_before_that_of_its_base_class(example: Any) -> None:
    """Classes of another package with the name of one of diffusers, and derived from one."""

    class DiTTransformer2DModel(diffusers.DiTTransformer2DModel):  # type: ignore[misc]
        pass

    config = DiffusersDiT().tiny()["dit"].keywords  # type: ignore[attr-defined]
    model = DiTTransformer2DModel(**config)
    assert DiffusersDiT().record(model) is DiffusersDiT().record(DiffusersDiT().tiny()["dit"]())
    own = dataclasses.replace(example, classes=("DiTTransformer2DModel",), library=__name__)
    transformer_records.register("own", own)
    assert DiffusersDiT().record(model) is own
    transformer_records.unregister("own")


def test_names_classes_and_small_models_are_unique(example: Any, clay: Any) -> None:
    with raises(VeneerError, where="clay", given="name 'clay'", expected="register()"):
        transformer_records.register("clay", dataclasses.replace(example, classes=("Other",), tiny={}))
    with raises(VeneerError, where="other", given="class 'ClayTransformer'"):
        transformer_records.register("other", dataclasses.replace(example, tiny={}))
    with raises(VeneerError, where="other", given="small model 'dit'", expected="veneer"):
        transformer_records.register("other", dataclasses.replace(example, classes=("Other",), tiny={"dit": {}}))
    assert "other" not in transformer_records.names()


def test_objects_that_are_no_records_and_names_of_this_package(clay: Any) -> None:
    with raises(VeneerError, where="net", given=clay, expected=transformer_records.TransformerRecord):
        transformer_records.register("net", clay)
    with raises(VeneerError, where="flux", given="veneer", expected=("clay",)):
        transformer_records.unregister("flux")
    assert "flux" in transformer_records.names()

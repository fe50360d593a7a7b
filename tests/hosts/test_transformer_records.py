"""Records of diffusion transformers: one per class, with the sizes and layers of the published models."""

from __future__ import annotations

from collections import Counter

import diffusers
import pytest
import torch
from torch import nn

from veneer.hosts._diffusion_transformers import records
from veneer.hosts.diffusers_dit import CORE, DiffusersDiT
from veneer.injection.sites import WeightSite
from veneer.testing.suite import REPRESENTATIVES, method_checks

LAYERS = (nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv3d)
PUBLISHED = [(family, name) for family, record in records().items() for name in record.full_size]
TINY = [(family, key) for family, record in records().items() for key in record.tiny]


def test_a_class_has_one_record_and_is_one_of_diffusers() -> None:
    classes = Counter(name for record in records().values() for name in record.classes)
    assert set(classes.values()) == {1}
    assert all(hasattr(diffusers, name) for name in classes)


def test_small_models_have_unique_names() -> None:
    assert len({key for _, key in TINY}) == len(TINY)
    assert set(CORE) < set(DiffusersDiT().tiny())


@pytest.mark.parametrize(("family", "name"), PUBLISHED)
def test_a_published_model_has_its_parameters_and_every_layer_is_a_site(family: str, name: str) -> None:
    record = records()[family]
    config, parameters = record.full_size[name]
    with torch.device("meta"):
        model = record.build(**config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    weights = [s for s in DiffusersDiT().sites(model) if isinstance(s, WeightSite) and s.rows is None]
    assert {s.path for s in weights} == {n for n, m in model.named_modules() if isinstance(m, LAYERS)}
    assert {s.role for s in weights} - {"other"} == {s.role for s in weights}


def test_methods_beside_the_representatives_are_checked_on_the_core_only() -> None:
    assert {c.model for c in method_checks("lora", "diffusers_dit")} == set(DiffusersDiT().tiny())
    assert "loha" not in REPRESENTATIVES
    assert {c.model for c in method_checks("loha", "diffusers_dit")} == set(CORE)

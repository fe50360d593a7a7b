"""Records of vision models of transformers: one per class, with the sizes and layers of the published models."""

from __future__ import annotations

import math
from collections import Counter
from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn

from tests.hosts.cases import build, case, outputs
from veneer.hosts._transformers_vision import records
from veneer.hosts.transformers_vit import CORE, TransformersViT
from veneer.injection import attach, sites
from veneer.injection.registry import host_of, hosts
from veneer.injection.sites import BranchSite, FeatureSite, ParamSite, StreamSite, TokenSite, WeightSite

LAYERS = (nn.Linear, nn.Embedding, nn.Conv2d)
PUBLISHED = [(family, name) for family, record in records().items() for name in record.full_size]
HEADS = [(family, name) for family, record in records().items() for name in record.heads]


def test_a_class_has_one_record_and_is_one_of_transformers() -> None:
    classes = Counter(name for record in records().values() for name in (*record.classes, *record.heads))
    assert set(classes.values()) == {1}
    assert all(hasattr(transformers, name) for name in classes)


def test_small_models_have_unique_names() -> None:
    names = [key for record in records().values() for key in record.tiny]
    assert len({*names, *CORE}) == len(names) + len(CORE)
    assert {*names, *CORE} == set(TransformersViT().tiny())


@pytest.mark.parametrize(("family", "name"), PUBLISHED)
def test_a_published_model_has_its_parameters_and_every_layer_is_a_site(family: str, name: str) -> None:
    record = records()[family]
    config, parameters = record.full_size[name]
    with torch.device("meta"):
        model = record.build(**config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    weights = [s for s in sites(model) if isinstance(s, WeightSite) and s.rows is None and s.param == "weight"]
    assert {s.path for s in weights} == {n for n, m in model.named_modules() if isinstance(m, LAYERS)}
    assert all(s.role != "other" for s in weights)


@pytest.mark.parametrize(("family", "name"), HEADS)
def test_a_classifier_of_transformers_has_the_sites_of_its_model_and_its_head(family: str, name: str) -> None:
    """Parameters that its logits do not depend on are inert, and the others are not."""
    record = records()[family]
    cls = getattr(transformers, name)
    tower = {**next(iter(record.tiny.values())), "num_labels": 5}
    composite = hasattr(cls.config_class(), "vision_config")
    torch.manual_seed(0)
    model = cls(cls.config_class(**({"vision_config": tower, "num_labels": 5} if composite else tower))).eval()
    host = host_of(model)
    assert isinstance(host, TransformersViT)
    table = list(sites(model))
    assert {s.role: s.classes for s in table if isinstance(s, FeatureSite)} == {"features": 5, "logits": 5}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    logits = next(outputs(model.double()(**host.sample(model))))
    assert logits.shape == (2, 5)
    (logits * torch.randn_like(logits)).sum().backward()
    for site in table:
        if isinstance(site, (ParamSite, WeightSite)):
            grad = model.get_submodule(site.path).get_parameter(site.param).grad
            size = 0.0 if grad is None else grad[slice(*site.rows) if site.rows else ...].abs().max().item()
            assert (size < 1e-6) if site.inert else (size > 1e-11), site.name


@pytest.mark.parametrize("key", ["vit", "deit", "dinov2", "dinov2_registers", "dinov3", "siglip", "clip", "beit_absolute"])
def test_inserted_tokens_change_the_output_and_leave_the_number_of_patches(key: str) -> None:
    model, host = build("transformers_vit", key).float(), TransformersViT()
    inputs = host.sample(model)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        attach(model, "vpt").probe()
        after = model(**inputs).last_hidden_state
    assert after.shape == before.shape
    assert not torch.equal(after, before)


def test_tokens_cannot_be_inserted_with_windows_relative_positions_or_a_mask() -> None:
    for key, builder in TransformersViT().tiny().items():
        can_insert = {site.can_insert for site in sites(builder()) if isinstance(site, TokenSite)}
        assert can_insert == {key not in ("swin", "beit", "siglip2")}, key


@pytest.mark.parametrize("key", [key for key in TransformersViT().tiny() if not key.startswith("beit")])
def test_a_block_adds_its_branches_to_the_stream(key: str) -> None:
    """The layer scales of BEiT are applied after the branches, those of other models inside."""
    found = case("transformers_vit", key)
    branches = {(s.depth, s.role): s for s in found.sites if isinstance(s, BranchSite)}
    for stream in (s for s in found.sites if isinstance(s, StreamSite) and s.depth is not None):
        attn, mlp = (branches[stream.depth, role] for role in ("attn", "mlp"))
        reads = [found.tensors[site.read.path, "in"] for site in (attn, mlp)]
        writes = [found.tensors[site.write.path, "out"] for site in (attn, mlp)]
        torch.testing.assert_close(reads[0] + writes[0], reads[1])
        torch.testing.assert_close(reads[1] + writes[1], found.tensors[stream.path, "out"])
        grid = math.prod(stream.grid) if stream.grid else 9
        assert reads[0].shape[1] == stream.prefix_tokens + grid


def test_patterns_without_a_tower_leave_the_image_encoder_of_a_pipeline() -> None:
    class Pipeline:
        components: ClassVar[dict[str, nn.Module]] = {
            "transformer": hosts.get("diffusers_dit")().tiny()["dit"](), "image_encoder": TransformersViT().tiny()["clip"]()
        }  # fmt: skip

    assert {site.component for site, _ in attach(Pipeline(), "lora", where="attn.q").parts.values()} == {"transformer"}
    named = attach(Pipeline(), "lora", where="vision/attn.q")
    assert {site.component for site, _ in named.parts.values()} == {"image_encoder"}


def test_prefix_tokens_are_counted() -> None:
    counts = {
        key: {site.prefix_tokens for site in sites(builder()) if isinstance(site, TokenSite)}
        for key, builder in TransformersViT().tiny().items()
    }
    assert counts == {
        "vit": {1}, "deit": {2}, "dinov2": {1}, "dinov2_registers": {3}, "dinov3": {3}, "siglip": {0},
        "siglip2": {0}, "clip": {1}, "beit": {1}, "swin": {0}, "classifier": {3},
    }  # fmt: skip

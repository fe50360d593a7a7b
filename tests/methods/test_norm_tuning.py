"""Norm tuning: deltas of the norms' scales and shifts, and of nothing else."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from veneer.injection import attach, hosts


@pytest.mark.parametrize(
    ("host", "key"), [("timm_vit", "vit"), ("timm_conv", "resnet"), ("timm_convnext", "convnext"), ("open_clip", "vit")]
)
def test_a_tuned_norm_is_the_norm_with_its_deltas_added(host: str, key: str) -> None:
    torch.manual_seed(0)
    found = hosts.get(host)()
    model = found.tiny()[key]().double().eval()
    explicit, inputs = copy.deepcopy(model), found.sample(model)
    tuned = attach(model, "norm_tuning", where=("norm", "bias.norm"))
    norms = {name for name, m in explicit.named_modules() if "norm" in type(m).__name__.lower() and hasattr(m, "weight")}
    assert {s.path for s, _ in tuned.parts.values()} == norms
    with torch.no_grad():
        for site, adapter in tuned.parts.values():
            adapter.delta.normal_(std=0.1)
            getattr(explicit.get_submodule(site.path), site.param).add_(adapter.delta)
        got, expected = (m(**inputs) for m in (model, explicit))
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        for a, b in pairs:
            torch.testing.assert_close(a, b)
    tuned.merge()
    for name, p in explicit.named_parameters():
        torch.testing.assert_close(tuned.host_state_dict()[name], p.detach(), msg=name)


def test_gradients_are_the_norms_own() -> None:
    torch.manual_seed(0)
    host = hosts.get("timm_vit")()
    model = host.tiny()["vit"]().double().eval()
    plain, inputs = copy.deepcopy(model), host.sample(model)
    tuned = attach(model, "norm_tuning")
    for each in (model, plain):
        each(**inputs).square().sum().backward()
    for site, adapter in tuned.parts.values():
        torch.testing.assert_close(adapter.delta.grad, getattr(plain.get_submodule(site.path), site.param).grad, msg=site.name)


def test_published_counts() -> None:
    """12 · 2 · 2 · 768 in the blocks of ViT-B/16, and 2 · 768 in the last norm."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    tuned = attach(vit, "norm_tuning")
    assert tuned.report().trainable == 36_864
    tuned.detach()
    assert attach(vit, "norm_tuning", where=("norm", "bias.norm")).report().trainable == 38_400


def test_norms_of_queries_and_keys_are_left_out_unless_named() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, qk_norm=True, num_classes=3).eval()
    tuned = attach(model, "norm_tuning")
    assert {s.role for s, _ in tuned.parts.values()} == {"norm", "bias.norm"}
    tuned.detach()
    tuned = attach(model, "norm_tuning", where=("norm.qk", "bias.norm.qk"))
    assert {s.path for s, _ in tuned.parts.values()} == {"blocks.0.attn.q_norm", "blocks.0.attn.k_norm"}


def test_batch_norms_train_and_their_statistics_are_saved_and_put_back() -> None:
    torch.manual_seed(0)
    host = hosts.get("timm_conv")()
    model = host.tiny()["resnet"]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)  # scales that begin as zero let no gradient through
    inputs, statistics = host.sample(model), {k: b.clone() for k, b in model.named_buffers()}
    tuned = attach(model, "norm_tuning")
    model.train()
    model(**inputs).square().sum().backward()
    assert all(a.delta.grad.abs().sum() > 0 for s, a in tuned.parts.values() if s.param == "weight")
    moved = [k for k in tuned.state_dict() if k.endswith(":running_mean")]
    assert len(moved) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    tuned.detach()
    assert all(torch.equal(b, statistics[k]) for k, b in model.named_buffers())

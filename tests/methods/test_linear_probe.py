"""Linear probing: the head alone, as a whole."""

from __future__ import annotations

import copy
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

import veneer
from tests.raising import raises
from veneer.injection import LoadError, UnsupportedSite, attach, hosts


def tiny(head: int = 0) -> nn.Module:
    """One backbone, with a head initialized by `head`."""
    torch.manual_seed(0)
    model = hosts.get("timm_vit")().tiny()["vit"]().eval()
    torch.manual_seed(head)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    return model


def sample() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def trained(model: nn.Module, steps: int = 3) -> veneer.Attachment:
    tuned = attach(model, "linear_probe")
    optimizer = torch.optim.SGD(tuned.parameters(), 0.5)
    for _ in range(steps):
        F.cross_entropy(model(sample()), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned


def test_it_equals_a_linear_layer_trained_on_the_features() -> None:
    model, plain = tiny(), tiny()
    tuned = trained(model)
    with torch.no_grad():
        features = plain.forward_head(plain.forward_features(sample()), pre_logits=True)
    layer = copy.deepcopy(plain.head)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    for _ in range(3):
        F.cross_entropy(layer(features), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(tuned.parts["head"][1].value, layer.weight)
    torch.testing.assert_close(tuned.parts["head.bias"][1].value, layer.bias)
    assert not torch.equal(layer.weight, plain.head.weight)
    with torch.no_grad():
        torch.testing.assert_close(model(sample()), layer(features))


def test_it_starts_as_the_host_and_switches_bitwise() -> None:
    model, bare = tiny(), tiny()
    with torch.no_grad():
        expected = bare(sample())
        tuned = attach(model, "linear_probe")
        assert torch.equal(model(sample()), expected)
        for _, adapter in tuned.parts.values():
            adapter.value.normal_()
        bare.head.weight.copy_(tuned.parts["head"][1].value)
        bare.head.bias.copy_(tuned.parts["head.bias"][1].value)
        assert torch.equal(model(sample()), bare(sample()))  # strength 1 is the trained head, to the bit
        tuned.scale = 0.0
        assert torch.equal(model(sample()), expected)
        tuned.scale = 1.0
        tuned.merge()
        assert torch.equal(model(sample()), bare(sample()))
        tuned.unmerge()
        tuned.detach()
        assert torch.equal(model(sample()), expected)


def test_loaded_on_another_head_it_gives_the_same_outputs_bitwise(tmp_path: Path) -> None:
    model = tiny()
    path = trained(model).save(tmp_path / "probe")
    with torch.no_grad():
        expected = model(sample())
        other = tiny(head=7)
        assert not torch.equal(other(sample()), expected)
        loaded = veneer.load(other, path)
        assert torch.equal(other(sample()), expected)
    loaded.detach()
    assert torch.equal(other.head.weight, tiny(head=7).head.weight)


def test_another_backbone_is_rejected(tmp_path: Path) -> None:
    path = trained(tiny()).save(tmp_path / "probe")
    other = tiny()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.neg_()
    with raises(LoadError, where="model", option="base"):
        veneer.load(other, path)


def test_counts_and_models_without_a_head() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
        headless = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(vit, "linear_probe").report().trainable == 1000 * (768 + 1) == 769_000
    with raises(UnsupportedSite, method="linear_probe", host="timm_vit"):
        attach(headless, "linear_probe")

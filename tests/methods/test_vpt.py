"""VPT against a forward pass of a ViT with the prompts written into it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import veneer
from tests.formats.cases import rewrite
from tests.raising import raises
from veneer.injection import LoadError, StateError, UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.injection.registry import hosts
from veneer.methods.prompt.vpt import VPT


def tiny(key: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    return hosts.get("timm_vit")().tiny()[key]().double().eval()


def picture() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def with_prompts(vit: nn.Module, prompts: list[Tensor | None], x: Tensor) -> Tensor:
    """[x_i, _, E_i] = L_i([x_{i−1}, P_{i−1}, E_{i−1}]): prompts overwrite the previous ones; None keeps those."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    first, count = vit.num_prefix_tokens, 0
    for block, prompt in zip(vit.blocks, prompts, strict=True):
        if prompt is not None:
            x = torch.cat([x[:, :first], prompt.expand(len(x), -1, -1), x[:, first + count :]], dim=1)
            count = len(prompt)
        x = block(x)
    x = torch.cat([x[:, :first], x[:, first + count :]], dim=1)
    return vit.forward_head(vit.norm(x))


@pytest.mark.parametrize("key", ["vit", "deit_distilled", "vit_registers"])
def test_deep(key: str) -> None:
    bare, model = tiny(key), tiny(key)
    tuned = attach(model, "vpt", tokens=3)
    prompts = [tuned.parts[f"blocks.{i}.tokens"][1].prompt for i in range(2)]
    assert len(tuned.parts) == 2
    torch.testing.assert_close(model(picture()), with_prompts(bare, prompts, picture()))


@pytest.mark.parametrize("key", ["vit", "deit_distilled", "vit_registers"])
def test_shallow(key: str) -> None:
    bare, model = tiny(key), tiny(key)
    tuned = attach(model, "vpt", tokens=3, where="tokens.tower")
    assert list(tuned.parts) == ["tokens"]
    expected = with_prompts(bare, [tuned.parts["tokens"][1].prompt, None], picture())
    torch.testing.assert_close(model(picture()), expected)
    assert (expected - bare(picture())).abs().max() > 1e-3


def test_average_pooling_leaves_the_prompts_out() -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **options).double().eval()
    tuned = attach(model, "vpt", tokens=50)
    prompts = [a.prompt for _, a in tuned.parts.values()]
    assert model.forward_features(picture()).shape == (2, 17, 24)
    got = model(picture())
    tuned.detach()
    torch.testing.assert_close(got, with_prompts(model, prompts, picture()))


@pytest.mark.parametrize("width", [5, 24])
def test_projected_prompts(width: int) -> None:
    """P' = P W + b with one W and b for all blocks, also where P is as wide as the model."""
    bare, model = tiny(), tiny()
    tuned = attach(model, "vpt", tokens=3, project=width)
    adapters = [adapter for _, adapter in tuned.parts.values()]
    (project,) = {id(a.project): a.project for a in adapters}.values()
    assert project.weight.shape == (24, width)
    prompts = [a.prompt @ project.weight.T + project.bias for a in adapters]
    expected = with_prompts(bare, prompts, picture())
    torch.testing.assert_close(model(picture()), expected)
    assert tuned.report().trainable == 2 * 3 * width + width * 24 + 24
    assert VPT(tokens=3, project=width).count(tuned.parts["blocks.0.tokens"][0]) == 3 * width
    trained = list(tuned.parameters())
    found = torch.autograd.grad(model(picture()).square().sum(), trained)
    wanted = torch.autograd.grad(expected.square().sum(), trained)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_projection_starts_as_in_the_authors_code() -> None:
    """Weight N(0, 2 / width), bias U(-1/sqrt(project), 1/sqrt(project)); 57,600 parameters for ViT-B/16, p = 10, project 64."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    tuned = attach(vit, "vpt", tokens=10, project=64)
    assert tuned.report().trainable == 57_600
    torch.manual_seed(0)
    site = tuned.parts["blocks.0.tokens"][0]
    (project,) = VPT(project=64).build_shared([site]).children()
    assert project.weight.std().item() == pytest.approx(math.sqrt(2 / 768), rel=0.02)
    assert project.bias.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)
    assert project.bias.abs().max() <= 1 / 8
    prompt = VPT(project=64).build(site).prompt
    assert prompt.std().item() == pytest.approx(math.sqrt(6 / (768 + 64)) / math.sqrt(3), rel=0.05)


def test_files_of_revision_1(tmp_path: Path) -> None:
    """No projection: bitwise. As wide as the model: there was none. Else one per block: rejected."""
    plain = attach(tiny(), "vpt", tokens=3)
    path = plain.save(tmp_path / "plain")
    for name, project in (("old", None), ("same", 24)):
        loaded = veneer.load(
            tiny(), rewrite(path, lambda header, p=project: first_revision(header, p), tmp_path / f"{name}.safetensors")
        )
        assert loaded.method.project == 0
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), plain.state_dict().values(), strict=True))
    tensors = {**plain.state_dict(), **{f"blocks.{i}.tokens:project.weight": torch.zeros(24, 5) for i in range(2)}}
    save_file(tensors, tmp_path / "x.safetensors", safe_open(path, "pt").metadata())
    rewrite(tmp_path / "x.safetensors", lambda header: first_revision(header, 5), tmp_path / "y.safetensors")
    with raises(LoadError, option="project", given=1, expected=2):
        veneer.load(tiny(), tmp_path / "y.safetensors")


def first_revision(header: dict[str, Any], project: int | None) -> None:
    """Written as before methods had revisions."""
    own = json.loads(header["__metadata__"]["veneer"])
    (entry,) = own["attachments"]
    assert entry.pop("revision") == 2
    entry["config"] |= {} if project is None else {"project": project}
    header["__metadata__"]["veneer"] = json.dumps(own)


def test_start_and_published_counts() -> None:
    """ViT-B/16: U(−v, v) with v = sqrt(6 / (3·16² + 768)); 12·p·768 deep, p·768 shallow."""
    torch.manual_seed(0)
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    deep = attach(vit, "vpt", tokens=50)
    assert deep.report().trainable == 460_800
    assert attach(vit, "vpt", tokens=10, name="ten").report().trainable == 92_160
    assert attach(vit, "vpt", tokens=50, where="tokens.tower").report().trainable == 38_400
    v = math.sqrt(6 / (3 * 16 * 16 + 768))
    prompt = VPT(tokens=200).build(deep.parts["blocks.0.tokens"][0]).prompt
    assert v * 0.999 < prompt.abs().max() <= v
    assert prompt.std().item() == pytest.approx(v / math.sqrt(3), rel=0.01)


def test_dropout_acts_on_the_prompts_in_training_only() -> None:
    model = tiny()
    tuned = attach(model, "vpt", tokens=3, dropout=0.5)
    assert torch.equal(model(picture()), model(picture()))
    adapter = tuned.parts["blocks.0.tokens"][1].train()
    tokens = adapter.insert(torch.zeros(2, 5, 24, dtype=torch.float64))[:, 1:4]
    kept = tokens != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(tokens[kept], (2 * adapter.prompt.expand(2, -1, -1))[kept])


def test_prompts_are_switched() -> None:
    model, bare = tiny(), tiny()
    tuned = attach(model, "vpt")
    with tuned.enabled(False):
        assert torch.equal(model(picture()), bare(picture()))
    assert not torch.equal(model(picture()), bare(picture()))
    with raises(StateError, given=0.5, expected=(0, 1)):
        tuned.scale = 0.5


@pytest.mark.parametrize("key", ["beit", "eva"])
def test_hosts_with_a_fixed_length_give_a_reason(key: str) -> None:
    with raises(UnsupportedSite, method="vpt", host="timm_vit", given={"can_insert": False}) as raised:
        attach(tiny(key), "vpt")
    assert "open_clip" in raised.value.supported_hosts
    assert "timm_vit" not in raised.value.supported_hosts


@pytest.mark.parametrize("options", [{"tokens": 0}, {"dropout": 1.0}, {"project": -1}])
def test_options_out_of_range(options: dict) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="vpt", option=option, given=given):
        VPT(**options)

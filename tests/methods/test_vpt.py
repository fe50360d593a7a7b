"""VPT against a forward pass of a ViT with the prompts written into it."""

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from veneer.injection import StateError, UnsupportedSite, attach
from veneer.injection.registry import hosts
from veneer.methods.prompt.vpt import VPT


def tiny(key: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    return hosts.get("timm_vit")().tiny()[key]().double().eval()


def picture() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def with_prompts(vit: nn.Module, prompts: list[Tensor | None], x: Tensor) -> Tensor:
    """[x_i, _, E_i] = L_i([x_{i−1}, P_{i−1}, E_{i−1}]): prompts overwrite those before; None lets them run on."""
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


def test_projected_prompts() -> None:
    bare, model = tiny(), tiny()
    tuned = attach(model, "vpt", tokens=3, project=5)
    prompts = []
    for _, adapter in tuned.parts.values():
        adapter.project.bias.data.normal_()
        prompts.append(adapter.prompt @ adapter.project.weight.T + adapter.project.bias)
    torch.testing.assert_close(model(picture()), with_prompts(bare, prompts, picture()))
    assert (
        tuned.report().trainable
        == 2 * (3 * 5 + 5 * 24 + 24)
        == 2 * VPT(tokens=3, project=5).count(tuned.parts["blocks.0.tokens"][0])
    )


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


def test_prompts_are_there_or_not() -> None:
    model, bare = tiny(), tiny()
    tuned = attach(model, "vpt")
    with tuned.enabled(False):
        assert torch.equal(model(picture()), bare(picture()))
    assert not torch.equal(model(picture()), bare(picture()))
    with pytest.raises(StateError, match=r"strength must be 0 or 1, got 0\.5"):
        tuned.scale = 0.5


@pytest.mark.parametrize("key", ["beit", "eva"])
def test_hosts_with_a_fixed_length_say_why_not(key: str) -> None:
    with pytest.raises(UnsupportedSite, match=r"timm_vit offers TokenSite\(can_insert=False\).*can_insert=True") as raised:
        attach(tiny(key), "vpt")
    assert (raised.value.method, raised.value.host) == ("vpt", "timm_vit")
    assert "open_clip" in raised.value.fits
    assert "timm_vit" not in raised.value.fits


@pytest.mark.parametrize("options", [{"tokens": 0}, {"dropout": 1.0}])
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match=r"^vpt: "):
        VPT(**options)

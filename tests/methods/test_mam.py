"""MAM: keys and values before those of attention, and a bottleneck beside the MLP, in blocks that are written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import veneer
from tests.methods.bottlenecks import picture, stirred, tiny
from tests.methods.transformer_blocks import attention, block_with, compare, heads_of, layers_of
from tests.raising import raises
from veneer.injection import attach, hosts
from veneer.injection.attachment.plan import supports
from veneer.injection.errors import OptionError
from veneer.injection.towers import sites
from veneer.methods.hybrid.mam import MAM


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("host", ["timm_vit", "open_clip", "transformers_vit", "diffusers_unet", "diffusers_dit"])
def test_a_block(host: str, hidden: int) -> None:
    block = block_with(host, "mam", tokens=3, hidden=hidden, bottleneck=7, scale=0.7)
    expected_roles = {"attn.out", "mlp"} | ({"xattn.out"} if host == "diffusers_unet" else set())
    assert set(block.adapters) == expected_roles

    def attend(role: str, attn: Any, x: Tensor, context: Tensor) -> Tensor:
        adapter = block.adapters[f"{role}.out"]
        if hidden:
            shared, out = adapter.shared, adapter.out
            prefix = (shared.table @ shared.layer.weight.T + shared.layer.bias).tanh() @ out.weight.T + out.bias
            keys, values = prefix.chunk(2, -1)
        else:
            keys, values = adapter.keys, adapter.values
        to_q, to_k, to_v, to_out = layers_of(attn)
        k, v = (torch.cat([p.expand(2, -1, -1), y], 1) for p, y in ((keys, to_k(context)), (values, to_v(context))))
        return to_out(attention(to_q(x), k, v, heads_of(attn)))

    def mlp(module: Any, x: Tensor) -> Tensor:
        a = block.adapters["mlp"]
        return module(x) + 0.7 * (torch.relu(x @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)

    compare(block, block.written_out(attend, mlp))


def test_the_file_has_the_keys_and_values_alone(tmp_path: Path) -> None:
    model, x = tiny(), picture()
    tuned = attach(model, "mam", tokens=3, hidden=5, bottleneck=4)
    stirred(tuned)
    before = model(x)
    assert tuned.report().trainable == 2 * (2 * 24 * 6 + 2 * 24 * 4 + 28) + 3 * 24 + 25 * 5
    tuned.finalize()
    torch.testing.assert_close(model(x), before)
    assert tuned.report().trainable == 2 * (2 * 24 * 3 + 2 * 24 * 4 + 28)
    loaded = tiny()
    assert veneer.load(loaded, tuned.save(tmp_path / "x")).method == MAM(tokens=3, hidden=0, bottleneck=4)
    assert torch.equal(loaded(x), model(x))


def test_models_without_softmax_attention_have_the_bottlenecks() -> None:
    """Swin v2, whose MLP has its norm behind it, so that it reads the stream."""
    swin: Any = hosts.get("timm_swin")().tiny()["swinv2"]().double().eval()
    tuned = attach(swin, "mam", bottleneck=4)
    assert {site.role for site, _ in tuned.parts.values()} == {"mlp"}
    assert tuned.finalize() is None
    a: Any = stirred(tuned)["layers.0.blocks.0.mlp.branch"]
    b, x = swin.layers[0].blocks[0], torch.randn(2, *swin.layers[0].blocks[0].input_resolution, 16, dtype=torch.float64)
    got = b(x)
    tuned.scale = 0
    middle = x + b.norm1(b._attn(x))
    change = 0.1 * (torch.relu(middle @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)
    torch.testing.assert_close(got - b(x), change)
    assert not any(supports(MAM, site) for site in sites(timm.create_model("resnet18", channels=(8, 8, 8, 8), stem_width=8)))


def test_published_count() -> None:
    """ViT-B/16 with p = 10 and h = 64: 184,320 in keys and values, 1,189,632 in bottlenecks."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    tuned = attach(vit, "mam", hidden=0)
    assert tuned.report().trainable == 1_373_952
    assert sum(tuned.method.count(site) for site, _ in tuned.parts.values()) == 1_373_952
    assert attach(vit, "mam", name="training").report().trainable == 12 * 2 * 768 * 513 + 10 * 768 + 769 * 512 + 1_189_632


def test_start_and_dropout() -> None:
    """Down uniform within 1 / √width, Up and biases zero; features are dropped in training alone."""
    torch.manual_seed(0)
    tuned = attach(tiny(), "mam", hidden=0, bottleneck=50, dropout=0.5)
    adapter: Any = tuned.parts["blocks.0.mlp.branch"][1]
    bound = math.sqrt(1 / 24)
    assert bound * 0.99 < adapter.down.abs().max() <= bound
    assert not any(p.any() for name, p in adapter.named_parameters() if name != "down")
    z = torch.ones(2, 8, 50, dtype=torch.float64)
    assert torch.equal(adapter.between(z), z)
    assert 0.4 < (adapter.train().between(z) == 0).double().mean() < 0.6
    prefix: Any = tuned.parts["blocks.0.attn.proj"][1]
    assert 0.4 < (prefix.train().keys_values()[0] == 0).double().mean() < 0.6


@pytest.mark.parametrize("options", [{"tokens": 0}, {"hidden": -1}, {"bottleneck": 0}, {"dropout": 1.0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="mam", option=option, given=given):
        MAM(**options)

"""Prefix-Tuning: attention with the keys and values written out, block by block, and the MLP without its result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import veneer
from tests.methods.bottlenecks import blocks_written_out, picture, random, stirred, tiny
from tests.raising import raises
from veneer.injection import attach, hosts
from veneer.injection.attachment.plan import supports
from veneer.injection.errors import OptionError, StateError, UnsupportedSite
from veneer.injection.towers import sites
from veneer.methods.prompt.soft_prompts.prefix_tuning import PrefixTuning

HEADS = 2


def attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor | float = 0.0) -> Tensor:
    """softmax([q P_kᵀ, q Kᵀ + mask] / √d) [P_v; V] for each head; q, k, v (B, N, width), P (p, width)."""
    q, k, v, keys, values = (x.unflatten(-1, (HEADS, -1)).transpose(-2, -3) for x in (q, k, v, keys, values))
    scale = math.sqrt(q.shape[-1])
    scores = torch.cat([q @ keys.mT / scale, q @ k.mT / scale + mask], -1).softmax(-1)
    added = keys.shape[-2]
    return (scores[..., :added] @ values + scores[..., added:] @ v).transpose(-2, -3).flatten(-2)


def gradients(y: Tensor, parameters: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), list(parameters))


def compare(model: nn.Module, tuned: Any, got: Tensor, expected: Tensor) -> None:
    """Equal values and gradients, of every trained parameter."""
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(gradients(y, tuned.parameters()) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0


def test_vit_with_the_mlp_and_its_result(tmp_path: Path) -> None:
    """P = W_o tanh(W E + b) + b_o. `finalize` leaves the function as it was, and the file has P_k and P_v alone."""
    bare, model, x = tiny(), tiny(), picture()
    tuned = attach(model, "prefix_tuning", tokens=3, hidden=5)
    adapters: Any = stirred(tuned)
    shared = adapters["blocks.0.attn.proj"].shared
    assert adapters["blocks.1.attn.proj"].shared is shared

    def block(depth: int, module: Any, x: Tensor) -> Tensor:
        out = adapters[f"blocks.{depth}.attn.proj"].out
        prefix = (shared.table @ shared.layer.weight.T + shared.layer.bias).tanh() @ out.weight.T + out.bias
        attn = module.attn
        y = attention(*attn.qkv(module.norm1(x)).chunk(3, -1), prefix[:, :24], prefix[:, 24:])
        x = x + attn.proj(y)
        return x + module.mlp(module.norm2(x))

    expected = blocks_written_out(bare, block, x)
    compare(model, tuned, model(x), expected)
    assert tuned.report().trainable == 2 * 2 * 24 * 6 + 3 * 24 + 25 * 5
    tuned.finalize()
    torch.testing.assert_close(model(x), expected)
    assert {name: t.shape for name, t in tuned.state_dict().items()} == {
        f"blocks.{i}.attn.proj:{x}": (3, 24) for i in (0, 1) for x in ("keys", "values")
    }
    loaded = tiny()
    assert veneer.load(loaded, tuned.save(tmp_path / "x")).method == PrefixTuning(tokens=3, hidden=0)
    assert torch.equal(loaded(x), model(x))
    tuned.finalize()
    torch.testing.assert_close(model(x), expected)


def test_causal_text_tower() -> None:
    """Every token attends to all added keys, and to no later token."""
    torch.manual_seed(0)
    model: Any = hosts.get("clip_text")().tiny()["clip"]().double().eval()
    attn, x = model.encoder.layers[0].self_attn, random(2, 6, 16)
    tuned = attach(model, "prefix_tuning", tokens=3, hidden=0)
    adapters: Any = stirred(tuned)
    adapter = adapters["encoder.layers.0.self_attn.out_proj"]
    mask = torch.full((6, 6), -math.inf, dtype=torch.float64).triu(1)
    parts = [layer(x) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
    expected = attn.out_proj(attention(*parts, adapter.keys, adapter.values, mask))
    for given in (attn(x, attention_mask=mask[None, None])[0], attn(x, attention_mask=None, is_causal=True)[0]):
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(("host", "key"), [("diffusers_unet", "sd1"), ("diffusers_dit", "dit")])
def test_diffusion(host: str, key: str) -> None:
    """Self-attention and, in a UNet, cross-attention, as processors that are written out."""
    torch.manual_seed(0)
    model: Any = hosts.get(host)().tiny()[key]().double().eval()
    tuned = attach(model, "prefix_tuning", tokens=3, hidden=0)
    adapters: Any = stirred(tuned)
    assert any("attn2" in name for name in adapters) == (host == "diffusers_unet")
    for name, adapter in adapters.items():
        if name.startswith(("mid", "transformer_blocks.1")):
            attn = model.get_submodule(name.removesuffix(".to_out.0"))
            x = random(2, 6, attn.query_dim)
            context = random(2, 5, attn.cross_attention_dim) if attn.is_cross_attention else x
            heads = [
                t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
            ]
            added = [
                t.unflatten(-1, (attn.heads, -1)).transpose(0, 1).expand(2, -1, -1, -1) for t in (adapter.keys, adapter.values)
            ]
            k, v = torch.cat([added[0], heads[1]], 2), torch.cat([added[1], heads[2]], 2)
            y = ((heads[0] @ k.mT / math.sqrt(k.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
            got = attn(x, encoder_hidden_states=context if attn.is_cross_attention else None)
            expected = attn.to_out[0](y) / attn.rescale_output_factor
            torch.testing.assert_close(got, expected)
            for a, b in zip(*(gradients(y, adapter.parameters()) for y in (got, expected)), strict=True):
                torch.testing.assert_close(a, b)


def test_swin_windows_and_hosts_that_are_not_supported() -> None:
    """timm's Swin adds relative positions to the scores of its windows; Swin v2 has a softmax of its own."""
    torch.manual_seed(0)
    model: Any = hosts.get("timm_swin")().tiny()["swin"]().double().eval()
    attn = model.layers[0].blocks[0].attn
    x = random(6, attn.window_area, 16)
    adapters: Any = stirred(attach(model, "prefix_tuning", tokens=3, hidden=0))
    adapter = adapters["layers.0.blocks.0.attn.proj"]
    expected = attn.proj(attention(*attn.qkv(x).chunk(3, -1), adapter.keys, adapter.values, attn._get_rel_pos_bias()))
    torch.testing.assert_close(attn(x), expected)
    assert not any(supports(PrefixTuning, site) for site in sites(hosts.get("timm_swin")().tiny()["swinv2"]()))


def test_start_dropout_and_counts() -> None:
    """ViT-B/16 with p = 10 184,320; with p = 30 and the MLP 9,872,384 and 15,402,272."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    for options, count in (
        ({"tokens": 10, "hidden": 0}, 184_320),
        ({"tokens": 30}, 9_872_384),
        ({"tokens": 30, "hidden": 800}, 15_402_272),
    ):
        tuned = attach(vit, "prefix_tuning", **options)
        assert tuned.report().trainable == count
        (site, _), *_ = tuned.parts.values()
        tuned.detach()
    torch.manual_seed(0)
    method = PrefixTuning(tokens=50, hidden=8)
    assert method.build_shared([site]).table.std().item() == pytest.approx(1, rel=0.02)
    adapter: Any = PrefixTuning(tokens=50, hidden=0, dropout=0.5).build(site)
    assert adapter.keys.std().item() == pytest.approx(0.02, rel=0.02)
    assert adapter.values.std().item() == pytest.approx(0.02, rel=0.02)
    zero = adapter.keys_values()[0] == 0
    assert 0.4 < zero.float().mean() < 0.6
    assert not (adapter.eval().keys_values()[0] == 0).any()


def test_strength_multiplies_the_attention_weights_of_the_keys() -> None:
    """At s: s·exp(q P_kᵀ / √d), so that a negative strength is an error and leaves the model as it was."""
    model, x = tiny(), random(2, 5, 24)
    tuned = attach(model, "prefix_tuning", tokens=3, hidden=0)
    adapter, attn = stirred(tuned)["blocks.0.attn.proj"], model.blocks[0].attn
    tuned.scale = 0.3
    q, k, v, keys, values = (
        y.unflatten(-1, (HEADS, -1)).transpose(-2, -3) for y in (*attn.qkv(x).chunk(3, -1), adapter.keys, adapter.values)
    )
    scores = (torch.cat([q @ keys.mT, q @ k.mT], -1) / math.sqrt(q.shape[-1])).exp()
    scores[..., :3] *= 0.3
    weights = scores / scores.sum(-1, keepdim=True)
    expected = attn.proj((weights[..., :3] @ values + weights[..., 3:] @ v).transpose(-2, -3).flatten(-2))
    torch.testing.assert_close(attn(x), expected)
    with raises(StateError, where="blocks.0.attn.proj", given=-0.5, expected=0):
        tuned.scale = -0.5
    assert tuned.scale == 0.3
    torch.testing.assert_close(attn(x), expected)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"hidden": -1}, {"dropout": 1.0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="prefix_tuning", option=option, given=given):
        PrefixTuning(**options)


def test_tokens_by_site_without_the_mlp_only(tmp_path: Path) -> None:
    """Without the MLP the tables of the sites are independent, and a file keeps their lengths."""
    options = {"name:blocks.1.attn.proj": {"tokens": 5}}
    tuned = attach(tiny(), "prefix_tuning", tokens=2, hidden=0, by_site=options)
    assert [{len(p) for p in adapter.parameters()} for _, adapter in tuned.parts.values()] == [{2}, {5}]
    loaded = veneer.load(tiny(), tuned.save(tmp_path / "prefix"))
    assert {name: p.shape for name, p in loaded.named_parameters()} == {name: p.shape for name, p in tuned.named_parameters()}
    with raises(UnsupportedSite, option="by_site", method="prefix_tuning", site="blocks.1.attn.proj"):
        attach(tiny(), "prefix_tuning", tokens=2, hidden=8, by_site=options)

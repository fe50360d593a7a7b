"""UniPELT: gated keys and values, low-rank updates and bottlenecks in blocks that are written out; gates token by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import veneer
from tests.methods.bottlenecks import LAYOUTS, branch, laid_out, picture, random, stirred, tiny, trained
from tests.methods.transformer_blocks import attention, block_with, compare, heads_of, layers_of
from tests.raising import raises
from veneer.injection import attach, hosts
from veneer.injection.errors import OptionError, StateError
from veneer.injection.sites import ParamSite
from veneer.methods.hybrid.unipelt import Gate, UniPELT


def gate_of(adapter: Any, x: Tensor) -> Tensor:
    """mean_t sigmoid(w·x_t + b) of each sample of (B, N, width), one token at a time: (B, 1, 1)."""
    w, b = adapter.gate.weight[0], adapter.gate.bias[0]
    means = [torch.stack([1 / (1 + (-(w @ token) - b).exp()) for token in sample]).mean() for sample in x]
    return torch.stack(means)[:, None, None]


@pytest.mark.parametrize("host", ["timm_vit", "open_clip", "transformers_vit", "diffusers_unet", "diffusers_dit"])
def test_a_block(host: str) -> None:
    """Every part at its place, with its own gate; open_clip reads its projections, so that they have no gated update."""
    block = block_with(host, "unipelt", tokens=3, hidden=0, rank=2, reduction=2)
    kinds = ("attn", "xattn") if host == "diffusers_unet" else ("attn",)
    parts = ("out",) if host == "open_clip" else ("q", "v", "out")
    assert set(block.adapters) == {f"{kind}.{part}" for kind in kinds for part in parts} | {"mlp"}

    def update(role: str, x: Tensor) -> Tensor | float:
        a = block.adapters.get(role)
        return 0.0 if a is None else gate_of(a, x) * (x @ a.down.T @ a.up.T)

    def attend(role: str, attn: Any, x: Tensor, context: Tensor) -> Tensor:
        prefix = block.adapters[f"{role}.out"]
        gate = gate_of(prefix, x)
        to_q, to_k, to_v, to_out = layers_of(attn)
        q, v = to_q(x) + update(f"{role}.q", x), to_v(context) + update(f"{role}.v", context)
        k, v = torch.cat([gate * prefix.keys, to_k(context)], 1), torch.cat([gate * prefix.values, v], 1)
        return to_out(attention(q, k, v, heads_of(attn)))

    def mlp(module: Any, x: Tensor) -> Tensor:
        a, y = block.adapters["mlp"], module(x)
        return y + gate_of(a, y) * (torch.relu(y @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)

    compare(block, block.written_out(attend, mlp))


def test_samples_have_gates_of_their_own() -> None:
    """The gates of two samples differ, and a sample gets the same output alone and in a batch."""
    model, x = tiny(), torch.cat([picture(), 5 * picture().flip(-1)])
    adapters: Any = stirred(attach(model, "unipelt", tokens=3, hidden=4, rank=2, reduction=2))
    gates: list[Tensor] = []
    for name in ("blocks.0.attn.proj", "blocks.0.attn.q", "blocks.0.mlp.branch"):
        adapters[name].gate.register_forward_hook(lambda _, __, gate: gates.append(gate))
    together = model(x)
    assert [g.shape for g in gates] == [(4, 1, 1)] * 3
    assert all((g[0] - g[2]).abs().item() > 1e-5 for g in gates)
    for i in range(len(x)):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bottleneck_in_every_layout(layout: Any) -> None:
    """One gate for all positions of a sample, with or without prefix tokens."""
    adapter = trained(UniPELT(reduction=2), branch(layout))
    pictures, prefix = random(2, 2, 3, 5), random(2, 2, 5, seed=1)
    got = adapter.output(*(laid_out(pictures, prefix, layout),) * 2)
    y = torch.cat([prefix, pictures.flatten(1, 2)], 1) if layout == "NLC" else pictures.flatten(1, 2)
    change = gate_of(adapter, y) * (torch.relu(y @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias)
    expected = y + change
    tokens, patches = (expected[:, :2], expected[:, 2:]) if layout == "NLC" else (prefix, expected)
    torch.testing.assert_close(got, laid_out(patches.unflatten(1, (2, 3)), tokens, layout))


def test_windows_have_gates_of_their_own() -> None:
    """timm's Swin calls attention with windows as a batch; its MLP has one gate for each image."""
    swin: Any = hosts.get("timm_swin")().tiny()["swin"]().double().eval()
    adapters: Any = stirred(attach(swin, "unipelt", tokens=3, hidden=0, rank=2, reduction=2))
    attn = swin.layers[0].blocks[0].attn
    prefix, q, v = (adapters[f"layers.0.blocks.0.attn.{part}"] for part in ("proj", "q", "v"))
    x = random(6, attn.window_area, 16)
    got = attn(x)
    weight, bias = attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)
    parts = [x @ w.T + b for w, b in zip(weight, bias, strict=True)]
    for i, a in ((0, q), (2, v)):
        parts[i] = parts[i] + gate_of(a, x) * (x @ a.down.T @ a.up.T)
    heads, gate = attn.num_heads, gate_of(prefix, x)
    queries, keys, values = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
    added = [(gate * table).unflatten(-1, (heads, -1)).transpose(1, 2) for table in (prefix.keys, prefix.values)]
    scores = [queries @ k.mT / math.sqrt(16 / heads) for k in (added[0], keys)]
    weights = torch.cat([scores[0], scores[1] + attn._get_rel_pos_bias()], -1).softmax(-1)
    expected = attn.proj((weights @ torch.cat([added[1], values], 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, expected)


def test_the_file_has_the_keys_and_values_alone(tmp_path: Path) -> None:
    model, x = tiny(), picture()
    tuned = attach(model, "unipelt", tokens=3, hidden=5, rank=2, reduction=2, biases=True)
    stirred(tuned)
    before = model(x)
    tuned.finalize()
    torch.testing.assert_close(model(x), before)
    loaded = tiny()
    method = UniPELT(tokens=3, hidden=0, rank=2, reduction=2, biases=True)
    assert veneer.load(loaded, tuned.save(tmp_path / "x")).method == method
    assert torch.equal(loaded(x), model(x))
    assert not any("shared" in name for name in tuned.state_dict())


def test_biases() -> None:
    """With the option every bias outside the head has a delta, which is added without a gate."""
    model, x = tiny(), random(2, 5, 24)
    tuned = attach(model, "unipelt", tokens=3, hidden=0, rank=2, reduction=2, biases=True)
    names = {site.name for site, _ in tuned.parts.values() if isinstance(site, ParamSite)}
    biases = {name for name, _ in tiny().named_parameters() if name.endswith(".bias") and not name.startswith("head")}
    assert {name.replace(".qkv.", ".") for name in biases} >= {n for n in names if ".attn." not in n}
    stirred(tuned)
    site, adapter = next(part for part in tuned.parts.values() if part[0].role == "bias.mlp.in")
    layer = model.get_submodule(site.path)  # type: ignore[union-attr]
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias + adapter.delta)
    assert not any(isinstance(site, ParamSite) for site, _ in attach(tiny(), "unipelt").parts.values())


def test_published_counts() -> None:
    """ViT-B/16: 184,320 in keys and values, 894,528 in bottlenecks, 294,912 in pairs, 36,912 in gates; 102,912 biases."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    for options, count in (({}, 184_320 + 894_528 + 294_912 + 36_912), ({"biases": True}, 1_410_672 + 102_912)):
        tuned = attach(vit, "unipelt", hidden=0, **options)
        assert tuned.report().trainable == count
        assert sum(tuned.method.count(site) for site, _ in tuned.parts.values()) == count
        tuned.detach()


def test_start() -> None:
    """Gates near one half, B zero, A uniform within 1 / √width, Down and Up normal."""
    torch.manual_seed(0)
    gate = Gate(5000)
    assert gate.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert gate.bias.item() == 0
    assert gate(torch.zeros(3, 4, 5000)).flatten().tolist() == [0.5] * 3
    parts = {site.role: a for site, a in attach(tiny(), "unipelt", hidden=0, reduction=1).parts.values()}
    pair, bottleneck = parts["attn.q"], parts["mlp"]
    assert not pair.up.any()
    assert 0.9 / math.sqrt(24) < pair.down.abs().max() <= 1 / math.sqrt(24)
    assert bottleneck.down.std().item() == pytest.approx(0.02, rel=0.1)
    assert bottleneck.up.std().item() == pytest.approx(0.02, rel=0.1)
    assert not bottleneck.down_bias.any()
    assert not bottleneck.up_bias.any()


@pytest.mark.parametrize("role", ["attn.q", "attn.out", "mlp", "bias.mlp.in"])
def test_sites_that_change_the_output_at_the_start(role: str) -> None:
    model, x = tiny(), picture()
    before = model(x)
    tuned = attach(model, "unipelt", hidden=0, biases=True, where=role)
    changes = {tuned.method.changes_at_start(site) for site, _ in tuned.parts.values()}
    assert changes == {not torch.equal(model(x), before)} == {role in ("attn.out", "mlp")}


def test_strength() -> None:
    """0 is the host; a negative one has no logarithm."""
    model, x = tiny(), picture()
    before = model(x)
    tuned = attach(model, "unipelt", tokens=3, hidden=0)
    stirred(tuned)
    whole = model(x)
    tuned.scale = 0
    assert torch.equal(model(x), before)
    tuned.scale = 1
    assert torch.equal(model(x), whole)
    with raises(StateError, given=-1, expected=0):
        tuned.scale = -1


@pytest.mark.parametrize("role", ["attn.q", "mlp"])
def test_strength_multiplies_the_change(role: str) -> None:
    tuned = attach(tiny(), "unipelt", hidden=0, rank=2, reduction=2)
    stirred(tuned)
    adapter: Any = next(adapter for site, adapter in tuned.parts.values() if site.role == role)
    x = random(2, 5, 24)
    whole = adapter.output(x, x) - x
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.output(x, x) - x, whole / 4)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"hidden": -1}, {"rank": 0}, {"reduction": 0}, {"dropout": 1.0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="unipelt", option=option, given=given):
        UniPELT(**options)

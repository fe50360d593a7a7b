"""Disabled heads against an attention that is written out, patterns of constructed maps, and the study of a model."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.test_head_pruning import gated_attention, vit
from tests.raising import raises
from veneer.attention_heads import AttentionCall, HeadsError, attention_layers, disabled_heads, pattern_of
from veneer.attention_heads.denoiser import record_calls
from veneer.attention_heads.study import mean_maps, study_heads
from veneer.injection import hosts


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def calls() -> dict[str, AttentionCall]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(6, 6, dtype=torch.float64)
    read = torch.rand(6, 6) > 0.3
    read.fill_diagonal_(True)
    return {
        "plain": AttentionCall(q, k, v),
        "scale": AttentionCall(q, k, v, scale=0.1),
        "causal": AttentionCall(q, k, v, causal=True),
        "bias": AttentionCall(q, k, v, bias),
        "mask": AttentionCall(q, k, v, read),
        "infinite": AttentionCall(q, k, v, bias.masked_fill(~read, float("-inf"))),
        "grouped": AttentionCall(q, k[:, :2], v[:, :2]),
        "cross": AttentionCall(q, k[..., :3, :], v[..., :3, :]),
    }


@pytest.mark.parametrize("kind", list(calls()))
def test_the_map_gives_the_output_and_uniform_attention_reads_what_may_be_read(kind: str) -> None:
    call = calls()[kind]
    groups = call.query.shape[1] // call.value.shape[1]
    values = call.value.repeat_interleave(groups, 1)
    torch.testing.assert_close((call.map() @ values.float()).double(), call.output(), rtol=1e-5, atol=1e-5)
    readable = (call.map() > 0).double()
    torch.testing.assert_close(call.uniform().output(), readable / readable.sum(-1, keepdim=True) @ values)


def test_disabled_heads_of_a_vit() -> None:
    model, x = vit(), torch.randn(2, 17, 24, dtype=torch.float64)
    attn: Any = model.blocks[1].attn  # type: ignore[index, union-attr]
    with torch.no_grad():
        with disabled_heads(model, {"blocks.1.attn.proj": (1, 3)}, "zero"):
            zero = attn(x)
        torch.testing.assert_close(zero, gated_attention(attn, x, torch.tensor([1.0, 0.0, 1.0, 0.0])))
        with disabled_heads(model, {"blocks.1.attn.proj": (2,)}):
            uniform = attn(x)
        values = F.linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, -1)[2][..., 12:18]
        mean = values.mean(1, keepdim=True) @ attn.proj.weight[:, 12:18].T
        expected = gated_attention(attn, x, torch.tensor([1.0, 1.0, 0.0, 1.0])) + mean
        torch.testing.assert_close(uniform, expected)
        torch.testing.assert_close(attn(x), gated_attention(attn, x, torch.ones(4)))


HOSTS = ("clip_text", "diffusers_unet", "open_clip", "timm_swin", "timm_vit", "transformers_vit")


@pytest.mark.parametrize("name", HOSTS)
def test_every_head_of_a_host_can_be_disabled(name: str) -> None:
    host = hosts.get(name)()
    variant, build = next(iter(host.tiny().items()))
    model = build()
    inputs = host.sample(model)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return tensors(model(**inputs))

    before, layers = run(), attention_layers(model)
    maps = mean_maps(layers, run)
    for layer in layers:
        assert maps[layer.name].shape[0] == layer.heads
        torch.testing.assert_close(maps[layer.name].sum(-1), torch.ones(maps[layer.name].shape[:2], dtype=torch.float64))
        for how in ("uniform", "zero"):
            with disabled_heads(model, {layer.name: (layer.heads - 1,)}, how):  # type: ignore[arg-type]
                assert not all(torch.equal(a, b) for a, b in zip(run(), before, strict=True)), (variant, layer.name)
        with disabled_heads(model, {layer.name: ()}):
            torch.testing.assert_close(run(), before)
    assert all(torch.equal(a, b) for a, b in zip(run(), before, strict=True))


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [each for value in values if value is not None for each in tensors(value)]


def test_patterns_of_constructed_maps() -> None:
    grid, count = (8, 8), 64
    position = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    distance = (position[:, None] - position[None]).abs().amax(-1)

    def with_class(patches: Tensor, share: float) -> Tensor:
        """A map with a class token that has `share` of the attention."""
        rows = torch.full((count + 1, count + 1), 0.0)
        rows[1:, 1:] = (1 - share) * patches / patches.sum(-1, keepdim=True)
        rows[:, 0] = share
        rows[0, 1:] = (1 - share) / count
        return rows

    near, wide, equal = (distance <= 1).float(), (distance <= 2).float(), torch.ones(count, count)
    names = {
        "vertical": with_class(equal, 0.8),
        "diagonal": with_class(near, 0.01),
        "vertical+diagonal": with_class(near, 0.5),
        "block": with_class(wide * (distance == 2), 0.01),
        "heterogeneous": with_class(equal, 1 / (count + 1)),
    }
    for name, attention in names.items():
        assert pattern_of(attention, 1, grid).name == name, pattern_of(attention, 1, grid)
    even = pattern_of(torch.full((65, 65), 1 / 65), 1, grid)
    assert (even.vertical, even.diagonal, even.block) == pytest.approx((0, 0, 0), abs=1e-2)
    assert pattern_of(torch.tensor([[0.9, 0.05, 0.05]] * 16)).name == "vertical", "cross-attention to one word"


def test_a_head_without_effect_changes_nothing_and_the_only_other_one_everything() -> None:
    model = vit(heads=2, depth=1)
    proj: Any = model.blocks[0].attn.proj  # type: ignore[index, union-attr]
    proj.weight.data[:, :12] = 0

    def measure() -> dict[str, float]:
        with torch.no_grad():
            return {"mean": float(model(image()).mean())}

    layers = attention_layers(model)
    done: list[tuple[int, int]] = []
    whole, reports = study_heads(layers, mean_maps(layers, measure), measure, progress=lambda *each: done.append(each))
    assert whole == measure()
    silent, other = ({way: change["mean"] for way, change in report.changes.items()} for report in reports)
    assert silent == pytest.approx({"uniform": 0, "zero": 0}, abs=1e-12)
    assert all(abs(change) > 1e-6 for change in other.values())
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_recorded_calls_of_a_denoiser_do_not_change_without_a_change() -> None:
    layer = nn.Linear(3, 3)

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, scale: float) -> tuple[Tensor]:
            return (self.layer(x) * scale,)

    denoiser = Denoiser()
    recorded = record_calls(denoiser, lambda: [denoiser(torch.ones(1, 3), scale=float(i)) for i in range(1, 10)], 3)
    assert [kwargs["scale"] for _, kwargs in recorded.calls] == [2.0, 5.0, 8.0]
    assert recorded.change() == {"change": 0.0}
    layer.weight.data *= 2
    layer.bias.data *= 2
    assert recorded.change()["change"] == pytest.approx(1)


def test_errors_name_layer_head_and_way() -> None:
    model = vit()
    with raises(HeadsError, given="blocks.7.attn.proj"), disabled_heads(model, {"blocks.7.attn.proj": (0,)}):
        pass
    with raises(HeadsError, where="blocks.0.attn.proj", given=(4,)), disabled_heads(model, {"blocks.0.attn.proj": (4,)}):
        pass
    with raises(HeadsError, where="how", given="half"), disabled_heads(model, {}, "half"):  # type: ignore[arg-type]
        pass
    with raises(HeadsError, where="ResNet", given=0):
        attention_layers(timm.create_model("resnet18", pretrained=False))


def test_attention_that_cannot_be_seen_is_an_error() -> None:
    host = hosts.get("timm_swin")()
    model = host.tiny()["swinv2"]()
    name = attention_layers(model)[0].name
    with raises(HeadsError, where=name), torch.no_grad(), disabled_heads(model, {name: (0,)}):
        model(**host.sample(model))

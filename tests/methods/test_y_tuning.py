"""Y-Tuning: the decoder of label embeddings written out head by head, on the tokens of a ViT."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.bottlenecks import picture, stirred, tiny
from tests.raising import raises
from veneer.injection import attach, hosts
from veneer.injection.attachment.plan import supports
from veneer.injection.errors import OptionError
from veneer.injection.towers import sites
from veneer.methods.additive.attention.y_tuning import YTuning


def attention(attn: Any, weights: Any, y: Tensor, x: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for each head, y (K, width), x (N, features)."""
    biases = attn.in_proj_bias.chunk(3)
    q, k, v = (z @ w.T + b for z, w, b in zip((y, x, x), weights, biases, strict=True))
    size = q.shape[1] // attn.num_heads
    parts = []
    for h in range(attn.num_heads):
        rows = slice(h * size, (h + 1) * size)
        parts.append((q[:, rows] @ k[:, rows].T / math.sqrt(size)).softmax(-1) @ v[:, rows])
    return torch.cat(parts, 1) @ attn.out_proj.weight.T + attn.out_proj.bias


def norm(layer: Any, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def scores(adapter: Any, tokens: Tensor) -> Tensor:
    """One image: tokens (N, features) to (K,)."""
    y = adapter.labels
    for layer in adapter.layers:
        y = norm(layer.norms[0], y + attention(layer.labels, layer.labels.in_proj_weight.chunk(3), y, y))
        separate = [getattr(layer.tokens, f"{name}_proj_weight") for name in "qkv"]
        y = norm(layer.norms[1], y + attention(layer.tokens, separate, y, tokens))
        hidden = (y @ layer.hidden.weight.T + layer.hidden.bias).clamp(min=0)
        y = norm(layer.norms[2], y + hidden @ layer.out.weight.T + layer.out.bias)
    return y @ adapter.score


@pytest.mark.parametrize(("key", "layers"), [("vit", 2), ("vit_registers", 1)])
def test_values_and_gradients(key: str, layers: int) -> None:
    bare, model, x = tiny(key), tiny(key), picture()
    tuned = attach(model, "y_tuning", width=8, heads=2, layers=layers)
    before = bare(x)
    assert torch.equal(model(x), before)
    (adapter,) = stirred(tuned).values()
    tokens = bare.forward_features(x)
    expected = before + torch.stack([scores(adapter, image) for image in tokens])
    got = model(x)
    torch.testing.assert_close(got, expected)
    parameters = list(tuned.parameters())
    gradients = [torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0
    tuned.scale = 0.25
    torch.testing.assert_close(model(x), before + 0.25 * (expected - before))


def test_dropout_acts_in_training_only() -> None:
    model, x = tiny(), picture()
    (adapter,) = stirred(attach(model, "y_tuning", width=8, heads=2, dropout=0.5)).values()
    assert torch.equal(model(x), model(x))
    adapter.train()
    assert not torch.equal(model(x), model(x))


def test_counts_and_start() -> None:
    """ViT-B/16 with 100 classes: 1,341,440 with width 256, 9,529,344 with that of the model."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=100)
    tuned = attach(vit, "y_tuning")
    assert tuned.report().trainable == 1_341_440
    assert attach(vit, "y_tuning", name="wide", width=768, heads=12).report().trainable == 9_529_344
    torch.manual_seed(0)
    adapter: Any = YTuning().build(tuned.parts["head.logits"][0])
    assert adapter.labels.std().item() == pytest.approx(0.02, rel=0.02)
    assert not adapter.score.any()


@pytest.mark.parametrize(("option", "given"), [("heads", 0), ("layers", 0), ("width", 254), ("dropout", 1.0)])
def test_bad_input(option: str, given: Any) -> None:
    options: dict[str, Any] = {option: given}
    with raises(OptionError, method="y_tuning", option=option, given=given):
        YTuning(**options)


def test_models_without_token_features_are_not_supported() -> None:
    convnext = sites(hosts.get("timm_convnext")().tiny()["convnext"]())
    assert not any(supports(YTuning, site) for site in convnext)
    assert [site.name for site in sites(tiny("deit_distilled")) if supports(YTuning, site)] == ["head.logits", "head_dist.logits"]

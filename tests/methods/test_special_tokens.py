"""PASTA: h + e at the special tokens of every block's input, against blocks that are written out."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.bottlenecks import blocks_written_out, picture, stirred, tiny
from tests.methods.dense import loss_of, small_model
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import StreamSite
from veneer.methods.selective.structures.special_tokens import SpecialTokens


def added(h: Tensor, vectors: Tensor) -> Tensor:
    """The sequence with a vector added to each of its first tokens, token by token."""
    rows = list(h.unbind(1))
    for p, e in enumerate(vectors):
        rows[p] = rows[p] + e
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("key", "tokens", "number"), [("vit", 0, 1), ("deit_distilled", 0, 2), ("vit_registers", 0, 3), ("vit_registers", 1, 1)]
)
def test_a_vit_written_out(key: str, tokens: int, number: int) -> None:
    """The class token, the distillation token and two registers; outputs and gradients."""
    bare, model = tiny(key), tiny(key)
    adapters: dict[str, Any] = {**stirred(attach(model, "special_tokens", tokens=tokens))}
    assert list(adapters) == ["blocks.0.stream", "blocks.1.stream"]
    leaves = [a.vectors.detach().clone().requires_grad_() for a in adapters.values()]
    assert {e.shape for e in leaves} == {(number, 24)}

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x = added(x, leaves[depth])
        x = x + b.ls1(b.attn(b.norm1(x)))
        return x + b.ls2(b.mlp(b.norm2(x)))

    expected, got = blocks_written_out(bare, block, picture()), model(picture())
    torch.testing.assert_close(got, expected)
    assert (expected - bare(picture())).abs().max() > 1e-3
    expected.square().sum().backward()
    got.square().sum().backward()
    for adapter, leaf in zip(adapters.values(), leaves, strict=True):
        torch.testing.assert_close(adapter.vectors.grad, leaf.grad)


@pytest.mark.parametrize(
    ("host", "key", "path", "blocks"),
    [
        ("clip_text", "clip", "encoder.layers.{}", 2),
        ("open_clip", "vit", "transformer.resblocks.{}", 2),
        ("open_clip", "vit", "visual.transformer.resblocks.{}", 2),
        ("transformers_vit", "clip", "", 2),
    ],
)
def test_other_towers(host: str, key: str, path: str, blocks: int) -> None:
    """The start token of a text and the class token of an image: as if each block were called with another input."""
    model, inputs = small_model(host, key)
    explicit, _ = small_model(host, key)
    tuned = attach(model, "special_tokens", where="block" if not path else f"name:{path.replace('{}', '*')}.stream")
    adapters: dict[str, Any] = {**stirred(tuned)}
    assert len(adapters) == blocks
    for name, (site, adapter) in tuned.parts.items():
        assert isinstance(site, StreamSite), name
        vectors: Tensor = adapter.vectors.detach().clone()
        assert vectors.shape == (1, site.width)
        forward = explicit.get_submodule(site.path).forward

        def call(h: Tensor, *args: Any, forward: Any = forward, vectors: Tensor = vectors, **kwargs: Any) -> Any:
            return forward(added(h, vectors), *args, **kwargs)

        explicit.get_submodule(site.path).forward = call
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model(**inputs)), loss_of(explicit(**inputs)))
        before, _ = small_model(host, key)
        assert (loss_of(model(**inputs)) - loss_of(before(**inputs))).abs() > 1e-3


def test_strength_multiplies_the_change() -> None:
    site = StreamSite(name="b", role="block", path="b", width=5, prefix_tokens=2)
    adapter: Any = SpecialTokens().build(site).double()
    torch.manual_seed(0)
    with torch.no_grad():
        adapter.vectors.normal_()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    whole = adapter.output(x, x) - x
    assert not whole[:, 2:].any()
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.output(x, x) - x, whole / 4)


def test_published_counts() -> None:
    """ViT-B/16: 12·768."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "special_tokens").report().trainable == 9_216


def test_initial_values() -> None:
    adapter: Any = SpecialTokens().build(StreamSite(name="b", role="block", path="b", width=5, prefix_tokens=2))
    assert not adapter.vectors.any()
    assert SpecialTokens.identity_at_start


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "depth": 1, "embed_dim": 24, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 56}),
        ("resnet18", {"channels": (8, 8, 8, 8), "stem_width": 8}),
    ],
)
def test_models_without_special_tokens_are_rejected(name: str, options: dict[str, Any]) -> None:
    with raises(UnsupportedSite, method="special_tokens"):
        attach(timm.create_model(name, **options), "special_tokens")


def test_wrong_options() -> None:
    with raises(OptionError, method="special_tokens", option="tokens", given=-1):
        SpecialTokens(tokens=-1)
    with raises(UnsupportedSite, method="special_tokens", site="blocks.0.stream", given=2, expected=1):
        attach(tiny("vit"), "special_tokens", tokens=2)

"""ARC: x + U diag(c) Uᵀ x + t before a layer, with U shared by all blocks, against explicit matrices and blocks written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.bottlenecks import blocks_written_out, picture, stirred, tiny
from tests.methods.layers import site_of
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach, hosts
from veneer.injection.attachment.probe import tensors
from veneer.injection.errors import OptionError
from veneer.methods.reparameterized.low_rank.arc import ARC


def trained(layer: nn.Module, rank: int = 3) -> Any:
    method, site = ARC(rank=rank), site_of(layer)
    torch.manual_seed(1)
    adapter = method.build(site)
    adapter.add_module("shared", method.build_shared([site]))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.5)
    return adapter.double().eval()


def slow(adapter: Any, x: Tensor) -> Tensor:
    """x' for x (…, width), by the dense matrix I + U diag(c) Uᵀ."""
    (U,) = adapter.shared.U.values()
    dense = sum(c * torch.outer(u, u) for c, u in zip(adapter.scale, U.T, strict=True))
    return x + adapter.strength * (x @ dense.T + adapter.shift)


@pytest.mark.parametrize("layer", [nn.Linear(8, 5), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1, stride=2)], ids=repr)
def test_inputs_and_merged_tensors_are_the_formula(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    adapter = trained(layer)
    adapter.strength.fill_(0.75)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    expected = slow(adapter, x)
    if isinstance(layer, nn.Conv2d):
        x, expected = x.movedim(-1, 1), expected.movedim(-1, 1)
    torch.testing.assert_close(adapter.input(x), expected)
    merged = {"weight": adapter.weight(layer.weight), "bias": adapter.bias(layer.bias, lambda: layer.weight)}
    torch.testing.assert_close(torch.func.functional_call(layer, merged, (x,)), layer(expected))


def test_gradients_are_those_of_the_dense_matrix() -> None:
    adapter = trained(nn.Linear(8, 5).double())
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 8, dtype=torch.float64)
    inputs = [x, *adapter.parameters()]
    assert len(inputs) == 4
    got = torch.autograd.grad((adapter.input(x) * weight).sum(), inputs)
    expected = torch.autograd.grad((slow(adapter, x) * weight).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 1e-3


def test_a_vit_with_the_papers_blocks() -> None:
    """Both norms are followed by the bottleneck; blocks share U; merging gives the same outputs."""
    bare, model = tiny(), tiny()
    tuned = attach(model, "arc", rank=4)
    adapters = stirred(tuned)
    assert [*adapters] == [f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "mlp.fc1")]
    shared = next(iter(adapters.values())).get_submodule("shared")
    assert [name for name, _ in shared.named_parameters()] == ["U.attn_24", "U.mlp_24"]

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        def changed(layer: str, x: Tensor) -> Tensor:
            a: Any = adapters[f"blocks.{depth}.{layer}"]
            U = shared.get_parameter(f"U.{layer.partition('.')[0]}_24")
            return x + (x @ (U * a.scale)) @ U.T + a.shift

        x = x + b.ls1(b.attn(changed("attn.qkv", b.norm1(x))))
        return x + b.ls2(b.mlp(changed("mlp.fc1", b.norm2(x))))

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3
        tuned.merge()
        torch.testing.assert_close(model(picture()), expected)


@pytest.mark.parametrize(("host", "key"), [("open_clip", "vit"), ("clip_text", "clip")])
def test_weights_that_are_read_and_separate_layers_merge_to_the_same_outputs(host: str, key: str) -> None:
    torch.manual_seed(0)
    model = hosts.get(host)().tiny()[key]().double().eval()
    inputs = hosts.get(host)().sample(model)
    tuned = attach(model, "arc", rank=4)
    stirred(tuned)
    with torch.no_grad():
        before = model(**inputs)
        tuned.merge()
        after = model(**inputs)
    for a, b in zip(tensors(after), tensors(before), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_on_the_low_features_in_training() -> None:
    adapter = trained(nn.Linear(8, 5).double(), rank=1)
    adapter.dropout = 0.5
    x = torch.randn(500, 8, dtype=torch.float64)
    whole = adapter.input(x) - x - adapter.shift
    torch.manual_seed(0)
    ratio = ((adapter.train().input(x) - x - adapter.shift).sum(-1) / whole.sum(-1)).detach()
    assert {*ratio.round(decimals=6).abs().tolist()} == {0.0, 2.0}
    assert ARC().dropout == 0.1


@pytest.mark.parametrize(("where", "expected"), [(None, 96_432), ("attn.qkv", 48_216)])
def test_counts(where: Any, expected: int) -> None:
    """Those of the authors' code on ViT-B/16, for both layers and for attention alone."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "arc", where=where).report().trainable == expected


def test_start() -> None:
    """U within sqrt(6 / (width + rank)), c before the MLP within sqrt(6 / (1 + rank)), c before attention and t zero."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=256, num_heads=2)
    adapters = dict(attach(model, "arc", rank=64).parts.values())
    by_role: Any = {site.role: adapter for site, adapter in adapters.items()}
    for U in by_role["mlp.in"].shared.U.values():
        assert 0.99 * (6 / 320) ** 0.5 < U.abs().max() <= (6 / 320) ** 0.5
    assert 0.9 * (6 / 65) ** 0.5 < by_role["mlp.in"].scale.abs().max() <= (6 / 65) ** 0.5
    assert not by_role["attn.qkv"].scale.any()
    assert not any(a.shift.any() for a in by_role.values())


def test_zero_initialization_leaves_the_output_unchanged() -> None:
    model = tiny()
    before = model(picture())
    attach(model, "arc", init="zero")
    assert torch.equal(model(picture()), before)


def test_convolutions_with_padding_are_rejected() -> None:
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8), stem_width=8)
    with raises(UnsupportedSite, method="arc", site="conv1", given=((7, 7), 1, (3, 3))):
        attach(model, "arc", where="conv.stem")


@pytest.mark.parametrize(("option", "given"), [("rank", 0), ("dropout", 1.0), ("init", "one")])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="arc", option=option, given=given):
        ARC(**{option: given})


def test_the_rank_is_the_same_at_all_sites() -> None:
    with raises(UnsupportedSite, option="by_site", given=("rank",)):
        attach(tiny(), "arc", by_site={"mlp.in": {"rank": 3}})

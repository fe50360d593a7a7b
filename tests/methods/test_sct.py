"""SCT: a linear layer on the most salient channels of the stream after attention, and how they are selected."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.bottlenecks import (
    WIDTH,
    blocks_written_out,
    branch,
    check_layouts,
    picture,
    random,
    stirred,
    tiny,
    trained,
)
from tests.raising import raises
from veneer.injection import LoadError, attach
from veneer.injection.errors import OptionError
from veneer.methods.selective.structures.sct import SCT

CHANNELS = [4, 1, 3]


def slow(a: Any, x: Tensor, y: Tensor) -> Tensor:
    out, chosen = y.clone(), a.index.tolist()
    for i, channel in enumerate(chosen):
        out[..., channel] = y[..., channel] + a.bias_s[i]
        for j, other in enumerate(chosen):
            out[..., channel] = out[..., channel] + a.weight_s[i, j] * (x + y)[..., other]
    return out


class Selected(SCT):
    """SCT on the channels 1, 3 and 4."""

    def build(self, site: Any) -> Any:
        adapter = super().build(site)
        adapter.index.copy_(torch.tensor(sorted(CHANNELS)))
        return adapter


def test_the_equation_in_every_layout() -> None:
    check_layouts(Selected(channels=3), branch, slow)


def test_gradients_are_those_of_the_equation() -> None:
    adapter = trained(Selected(channels=3), branch())
    x, y = random(2, 8, WIDTH).requires_grad_(), random(2, 8, WIDTH, seed=1).requires_grad_()
    inputs, weight = [x, y, *adapter.parameters()], random(2, 8, WIDTH, seed=2)
    got = torch.autograd.grad((adapter.output(x, y) * weight).sum(), inputs)
    expected = torch.autograd.grad((slow(adapter, x, y) * weight).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize(("key", "prefix"), [("vit", 1), ("vit_registers", 3)])
def test_salient_channels_and_blocks_of_a_vit(key: str, prefix: int) -> None:
    """S has the largest mean over classes of the norm over images and patches, in the model without adapters."""
    bare, model = tiny(key), tiny(key)
    tuned = attach(model, "sct", channels=5)
    images, labels = random(6, 3, 32, 32, seed=7), torch.tensor([0, 2, 0, 5, 2, 0])
    tuned.prepare([(images[:4], labels[:4]), (images[4:], labels[4:])])
    streams: list[Tensor] = []
    for b in bare.blocks:
        b.norm2.register_forward_pre_hook(lambda m, args: streams.append(args[0].detach()))
    bare(images)
    adapters: Any = stirred(tuned)
    for stream, adapter in zip(streams, adapters.values(), strict=True):
        norms = torch.stack([stream[labels == c, prefix:].flatten(0, 1).norm(dim=0) for c in (0, 2, 5)])
        assert adapter.index.tolist() == sorted(norms.mean(0).argsort(descending=True)[:5].tolist())

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        a, z = adapters[f"blocks.{depth}.attn.branch"], x + b.ls1(b.attn(b.norm1(x)))
        x = z.clone()
        x[..., a.index] += z[..., a.index] @ a.weight_s.T + a.bias_s
        return x + b.ls2(b.mlp(b.norm2(x)))

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["NLC", "NHWC", "NCHW"])
def test_special_tokens_do_not_count(layout: str) -> None:
    """The largest feature of a class or register token is in channel 4, that of the patches in channel 1."""
    site, method = branch(layout), SCT(channels=1)
    adapter: Any = method.build(site)
    dim = 1 if layout == "NCHW" else -1
    x = torch.zeros(2, 10, WIDTH) if layout == "NLC" else torch.zeros(2, 4, 4, WIDTH).movedim(-1, dim)
    x.select(dim, 1).fill_(1.0)
    if layout == "NLC":
        x[:, : site.prefix_tokens, 4] = 100.0
    else:
        x.select(dim, 0).flatten(1)[:, 0] = 2.0
    method.prepare(
        [(site, adapter)], lambda images: adapter.output(images, torch.zeros_like(images)), [(x, torch.tensor([0, 1]))]
    )
    assert adapter.index.tolist() == [1]


def test_selected_channels_are_saved() -> None:
    model, other = tiny(), tiny()
    tuned, fresh = attach(model, "sct", channels=5), attach(other, "sct", channels=5)
    tuned.prepare([(picture(), torch.tensor([0, 1]))])
    assert any(a.index.tolist() != [0, 1, 2, 3, 4] for _, a in tuned.parts.values())
    fresh.load_state_dict(tuned.state_dict())
    assert torch.equal(model(picture()), other(picture()))


def test_loaded_adapters_keep_their_channels() -> None:
    """A run that continues from a file selects no other channels than W was trained for."""
    tuned, again, new = (attach(tiny(), "sct", channels=5) for _ in range(3))
    tuned.prepare([(picture(), torch.tensor([0, 1]))])
    again.load_state_dict(tuned.state_dict())
    again.prepare([(-picture().flip(1), torch.tensor([0, 1]))])
    new.prepare([(-picture().flip(1), torch.tensor([0, 1]))])
    first, second, third = ([a.index.tolist() for _, a in each.parts.values()] for each in (tuned, again, new))
    assert second == first != third


def test_an_image_with_several_labels_counts_in_each_of_its_classes() -> None:
    """As if it was passed once for each of them; one without labels in none."""
    several, single = (attach(tiny(), "sct", channels=5) for _ in range(2))
    images = random(4, 3, 32, 32, seed=7) * torch.tensor([1.0, 0.1, 3.0, 50.0]).view(-1, 1, 1, 1)
    several.prepare([(images, torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]]))])
    single.prepare([(images[[0, 0, 1, 2]], torch.tensor([0, 2, 2, 1]))])
    chosen, expected = ([a.index.tolist() for _, a in each.parts.values()] for each in (several, single))
    assert chosen == expected


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 24], [-1, 1, 2, 3, 4], [0, 1, 1, 3, 4]])
def test_channels_of_a_file_that_do_not_exist(index: list[int]) -> None:
    tuned = attach(tiny(), "sct", channels=5)
    state = {**tuned.state_dict(), "blocks.0.attn.branch:index": torch.tensor(index)}
    with raises(LoadError, where="blocks.0.attn.branch", option="index", expected=(0, 23)):
        tuned.load_state_dict(state)


def test_without_images_nothing_is_selected() -> None:
    tuned = attach(tiny(), "sct", channels=5)
    with raises(OptionError, option="batches", given=0):
        tuned.prepare([])
    assert all(a.labels is None and a.index.tolist() == [0, 1, 2, 3, 4] for _, a in tuned.parts.values())


def test_strength_multiplies_the_change() -> None:
    adapter, x, y = trained(Selected(channels=3), branch()), random(2, 8, 5), random(2, 8, 5, seed=1)
    whole = adapter.output(x, y) - y
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.output(x, y) - y, whole / 4)


def test_counts() -> None:
    """Those of the authors' code on ViT-B/16: 96 channels for each block."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "sct").report().trainable == 111_744


def test_start() -> None:
    """W normal with 0.02, b zero; all channels of a narrow branch; no change with std 0."""
    torch.manual_seed(0)
    adapter = SCT(channels=200).build(branch(width=128))
    assert adapter.weight_s.shape == (128, 128)
    assert adapter.weight_s.std().item() == pytest.approx(0.02, rel=0.03)
    assert not adapter.bias_s.any()
    model = tiny()
    before = model(picture())
    attach(model, "sct", std=0.0)
    assert torch.equal(model(picture()), before)


@pytest.mark.parametrize(("option", "given"), [("channels", 0), ("std", -0.1)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="sct", option=option, given=given):
        SCT(**{option: given})

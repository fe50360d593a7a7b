"""MAD-X: a NICE coupling of the embeddings and a bottleneck after every MLP, stacked under a task adapter and exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import veneer
from tests.methods.bottlenecks import blocks_written_out, branch, change, check_layouts, everywhere, picture, stirred, tiny
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import BranchSite, StreamSite
from veneer.methods.additive.stacked.mad_x import MadX


def coupled(t: dict[str, Tensor], x: Tensor) -> Tensor:
    """y₁ = x₁ + F(x₂) and y₂ = x₂ + G(y₁) with the coupling's tensors by name."""

    def two_layers(name: str, z: Tensor) -> Tensor:
        low = torch.relu(z @ t[f"coupling.{name}_down"].T + t[f"coupling.{name}_down_bias"])
        return low @ t[f"coupling.{name}_up"].T + t[f"coupling.{name}_up_bias"]

    half = x.shape[-1] // 2
    first = x[..., :half] + two_layers("f", x[..., half:])
    return torch.cat([first, x[..., half:] + two_layers("g", first)], -1)


def bottleneck(t: dict[str, Tensor], y: Tensor) -> Tensor:
    return y + torch.relu(y @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]


def expected_output(domain: dict[str, dict[str, Tensor]], task: dict[str, dict[str, Tensor]]) -> Tensor:
    """The bare model with the domain adapter, and the task adapter on its output."""

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        name = f"blocks.{depth}.mlp.branch"
        x = coupled(domain["blocks.0.stream"], x) if depth == 0 else x
        x = x + b.ls1(b.attn(b.norm1(x)))
        y = bottleneck(domain[name], b.ls2(b.mlp(b.norm2(x))))
        return x + (bottleneck(task[name], y) if task else y)

    return blocks_written_out(tiny(), block, picture())


def leaves(attachment: Any) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
        for name, (_, adapter) in attachment.parts.items()
    }


def test_a_vit_written_out_and_the_exchange(tmp_path: Path) -> None:
    """Values and gradients of domain and task adapter; then the domain adapter of another file, under the same task adapter."""
    model, other = tiny(), attach(tiny(), "mad_x")
    domain = attach(model, "mad_x", reduction=2, name="domain")
    assert set(domain.parts) == {"blocks.0.stream", "blocks.0.mlp.branch", "blocks.1.mlp.branch"}
    stirred(domain)
    stirred(other)
    for p in other.parameters():
        p.data.mul_(-0.7)
    task = attach(model, "pfeiffer", name="task")
    stirred(task)
    by_hand = leaves(domain), leaves(task)
    expected, got = expected_output(*by_hand), model(picture())
    torch.testing.assert_close(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    for attachment, values in zip((domain, task), by_hand, strict=True):
        for name, (_, adapter) in attachment.parts.items():
            for key, p in adapter.named_parameters():
                torch.testing.assert_close(p.grad, values[name][key].grad, msg=lambda text, at=f"{name}.{key}": f"{at}: {text}")
    domain.swap(other.save(tmp_path / "other"))
    exchanged = expected_output(leaves(other), by_hand[1])
    torch.testing.assert_close(model(picture()), exchanged)
    assert (exchanged - expected).abs().max() > 1e-3


@pytest.mark.parametrize("width", [6, 7])
def test_the_coupling_is_invertible(width: int) -> None:
    """Both halves of an even or odd width: subtracted in reverse order, they give the input again."""
    torch.manual_seed(0)
    site = StreamSite(name="block.stream", role="block", path="block", width=width)
    adapter = MadX().build(site).double()
    for p in adapter.parameters():
        p.data.normal_()
    t, x = dict(adapter.named_parameters()), torch.randn(2, 3, width, dtype=torch.float64)
    y: Any = adapter.output(x, x)
    torch.testing.assert_close(y, coupled(t, x))
    first, second = y[..., : width // 2], y[..., width // 2 :]
    keys = ("down", "down_bias", "up", "up_bias")
    (f, g) = ({key: t[f"coupling.{name}_{key}"] for key in keys} for name in "fg")
    second = second - (torch.relu(first @ g["down"].T + g["down_bias"]) @ g["up"].T + g["up_bias"])
    first = first - (torch.relu(second @ f["down"].T + f["down_bias"]) @ f["up"].T + f["up_bias"])
    torch.testing.assert_close(torch.cat([first, second], -1), x)
    assert (y - x).abs().max() > 0.1
    assert MadX().count(site) == sum(p.numel() for p in adapter.parameters())


def test_the_bottleneck_in_every_layout() -> None:
    check_layouts(MadX(), branch, lambda a, x, y: y + everywhere(lambda v: change(a, torch.relu, v), x))


@pytest.mark.parametrize(("where", "expected"), [(None, 7_387_776), ("mlp", 7_091_712), ("block", 296_064)])
def test_published_counts(where: str | None, expected: int) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "mad_x", where=where).report().trainable == expected


def test_initial_values() -> None:
    torch.manual_seed(0)
    site = StreamSite(name="block.stream", role="block", path="block", width=320)
    for adapter in (MadX().build(branch(width=320)), MadX().build(site)):
        for name, p in adapter.named_parameters():
            if "bias" in name:
                assert not p.any()
            else:
                assert p.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("option", ["reduction", "coupling_reduction"])
def test_wrong_options(option: str) -> None:
    with raises(OptionError, method="mad_x", option=option, given=0):
        MadX(**{option: 0})


def test_models_without_embeddings_of_this_layout() -> None:
    """Channels first: bottlenecks only."""
    torch.manual_seed(0)
    model = veneer.hosts.get("timm_convnext")().tiny()
    tuned = attach(next(iter(model.values()))(), "mad_x")
    assert {type(site) for site, _ in tuned.parts.values()} == {BranchSite}

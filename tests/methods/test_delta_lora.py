"""Delta-LoRA: training steps against dense base weights that are written at every step, state of the moved part, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import veneer
from tests.methods.layers import site_of
from tests.methods.selections import at_sites, explicit, plain_gradients, tiny
from tests.methods.weight_updates import check_update
from tests.raising import raises
from veneer.functional.convolve import convolve
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank.delta_lora import DeltaLoRA
from veneer.testing.case import loss

METHOD = DeltaLoRA(rank=4, alpha=2.0, ratio=1.5, warmup=0.4)
LAYERS = [nn.Linear(7, 6), nn.Conv2d(4, 8, (3, 1), groups=2), nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.Embedding(9, 6)]


def product(down: Tensor, up: Tensor, shape: torch.Size) -> Tensor:
    """B A of flattened kernels; all groups share A, or there is one group."""
    return (up.flatten(1) @ down.flatten(1)).reshape(shape)


def moved(adapter: Any) -> None:
    """Factors, recorded factors and gain away from zero."""
    with torch.no_grad():
        for tensor in (adapter.down, adapter.up, adapter.down0, adapter.up0):
            tensor.normal_(std=0.3)
        adapter.gain.fill_(0.7)


def equation(adapter: Any, weight: Tensor) -> Tensor:
    """s·B A + g·s·(B A − B0 A0), whose second term is a constant."""
    new, old = (product(d, u, weight.shape) for d, u in ((adapter.down, adapter.up), (adapter.down0, adapter.up0)))
    return adapter.scaling * (new + adapter.gain * (new.detach() - old))


@pytest.mark.parametrize(("host", "name", "where"), [("timm_vit", "vit", None), ("diffusers_unet", "sd1", "xattn.q conv.res")])
def test_the_moved_part_has_no_gradient(host: str, name: str, where: str | None) -> None:
    check_update(host, name, METHOD, equation, where, moved)


def test_training_moves_the_base_weights_of_a_vit() -> None:
    """SGD written out: s·B A beside W, and W += λ·s·(change of B A) after each step beyond K."""
    model, samples = tiny("timm_vit", "vit")
    bare, steps, rate = copy.deepcopy(model), 5, 30.0
    tuned = attach(model, METHOD, where="attn.{q,v} mlp.in")
    adapters = [adapter for _, adapter in tuned.parts.values()]
    before = {name: tensor.clone() for name, tensor in tuned.host_state_dict().items()}
    s, pairs = 0.5, [(a.down.detach().clone(), a.up.detach().clone()) for a in adapters]
    base = [torch.zeros_like(w) for w in at_sites(tuned, dict(bare.named_parameters()))]
    for step in range(1, steps + 1):
        dense = explicit(bare, tuned, [w + s * up @ down for w, (down, up) in zip(base, pairs, strict=True)])
        (of_sample,) = plain_gradients(dense, samples[:1])
        gradients = at_sites(tuned, of_sample)
        new = [(d - rate * s * u.T @ g, u - rate * s * g @ d.T) for (d, u), g in zip(pairs, gradients, strict=True)]
        if step > 2:  # K = 0.4·5
            base = [w + 1.5 * s * (n[1] @ n[0] - o[1] @ o[0]) for w, n, o in zip(base, new, pairs, strict=True)]
        pairs = new
        loss(model, samples[0]).backward()
        with torch.no_grad():
            for p in tuned.parameters():
                p.sub_(p.grad, alpha=rate)
        tuned.after_step(step, steps)
        model.zero_grad()
        for adapter, (down, up), w in zip(adapters, pairs, base, strict=True):
            torch.testing.assert_close(adapter.down.detach(), down, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(adapter.delta() * s, w + s * up @ down, rtol=1e-4, atol=1e-6)
    assert max(w.abs().max() for w in base) > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.host_state_dict().items())


@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_forms_of_each_kind_of_layer(base: Any) -> None:
    """Output and weight form agree, and the pair of twice the rank is the same update."""
    base = copy.deepcopy(base).double()
    table = WeightSite(name="t", role="embed.token", path="0", kind="embedding", d_out=6, d_in=9)
    site = table if isinstance(base, nn.Embedding) else site_of(base)
    adapter = METHOD.build(site).double()
    assert torch.equal(adapter.weight(base.weight), base.weight)
    torch.manual_seed(0)
    moved(adapter)
    shape = (2, 4, 5, 6) if site.kernel else (2, 5, 7)
    x = torch.randint(9, (2, 5)) if site.kind == "embedding" else torch.randn(shape, dtype=torch.float64)
    change = adapter.weight(base.weight) - base.weight
    y = base(x)
    if site.kind == "embedding":
        expected = y + nn.functional.embedding(x, change)
    else:
        expected = y + convolve(x, change, site.stride, site.padding, site.dilation, site.groups)
    torch.testing.assert_close(adapter.output(x, y), expected)
    left, right = adapter.factors()
    matrix = change.T[None] if site.kind == "embedding" else change.flatten(1).unflatten(0, (site.groups, -1))
    torch.testing.assert_close(left @ right, (matrix.mT if site.kind == "embedding" else matrix))


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 1), (0.3, 3), (1.0, 10)])
def test_the_base_weight_starts_to_move_after_k_steps(warmup: float, first: int) -> None:
    site = site_of(LAYERS[0])
    method = DeltaLoRA(rank=2, ratio=1.5, warmup=warmup, by_site={"l": {"ratio": 0.25}})
    adapter = method.build(site)
    for step in range(1, 11):
        torch.nn.init.normal_(adapter.up)
        method.after_step([(site, adapter)], step, 10)
        assert adapter.gain.item() == (0.25 if step >= first else 0.0), step
        if step == first:
            assert torch.equal(adapter.up0, adapter.up if warmup else torch.zeros_like(adapter.up))
            kept = adapter.up0.clone()
    assert torch.equal(adapter.up0, kept)


def test_files_swap_and_detach(tmp_path: Path) -> None:
    """Files hold the moved part, a swap into a larger rank gives the same outputs, and detaching restores the base bitwise."""
    model, samples = tiny("timm_vit", "vit")
    bare = loss(model.requires_grad_(False), samples[0])
    tuned = attach(model, METHOD)
    for _, adapter in tuned.parts.values():
        moved(adapter)
    path, got = tuned.save(tmp_path / "x"), loss(model, samples[0])
    assert {key.rpartition(":")[2] for key in tuned.state_dict()} == {"down", "up", "down0", "up0", "gain"}
    tuned.detach()
    assert torch.equal(loss(model.requires_grad_(False), samples[0]), bare)
    other, _ = tiny("timm_vit", "vit")
    loaded = veneer.load(other, path)
    assert torch.equal(loss(other, samples[0]), got)
    loaded.detach()
    larger = attach(other, DeltaLoRA(rank=6, alpha=1.0))
    larger.swap(path)
    torch.testing.assert_close(loss(other, samples[0]), got)


@pytest.mark.parametrize("warmup", [0.0, 0.4])
def test_a_run_that_continues_from_a_file_keeps_the_moved_part(warmup: float, tmp_path: Path) -> None:
    """Starting to move changes nothing by itself: not of a base weight that moves already, nor of factors that were trained."""
    for gain in (1.5, 0.0):
        model, samples = tiny("timm_vit", "vit")
        tuned = attach(model, DeltaLoRA(rank=4, ratio=1.5, warmup=warmup))
        for _, adapter in tuned.parts.values():
            moved(adapter)
            adapter.gain.fill_(gain)
        path, expected = tuned.save(tmp_path / str(gain)), loss(model, samples[0])
        tuned.detach()
        again = attach(model, DeltaLoRA(rank=6, ratio=1.5, warmup=warmup))
        again.swap(path)
        for step in range(1, 6):
            again.after_step(step, 5)
            torch.testing.assert_close(loss(model, samples[0]), expected)
        assert all(adapter.gain == 1.5 for _, adapter in again.parts.values())


def test_a_run_that_continues_with_another_ratio_is_an_error(tmp_path: Path) -> None:
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, DeltaLoRA(rank=4, ratio=1.5, warmup=0.4))
    for _, adapter in tuned.parts.values():
        moved(adapter)
    path = tuned.save(tmp_path / "x")
    tuned.detach()
    again = attach(model, DeltaLoRA(rank=4, ratio=1.5, warmup=0.4))
    again.swap(path)
    with raises(OptionError, method="delta_lora", option="ratio", given=1.5, expected=pytest.approx(0.7)):
        again.after_step(1, 5)


def test_count_of_vit_b() -> None:
    """12 blocks, q and v, 2·768·8 each."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(vit, "delta_lora", where="attn.{q,v}").report().trainable == 294_912


@pytest.mark.parametrize(("option", "given"), [("rank", 0), ("ratio", -0.1), ("ratio", float("nan")), ("warmup", 1.1)])
def test_bad_options(option: str, given: float) -> None:
    with raises(OptionError, method="delta_lora", option=option):
        DeltaLoRA(**{option: given})

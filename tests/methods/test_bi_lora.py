"""Bi-LoRA and Bi-AdaptFormer: one bit per entry with straight-through gradients, files of bits, counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import veneer
from tests.methods.bottlenecks import branch, check_layouts
from tests.methods.layers import site_of
from tests.methods.selections import tiny
from tests.methods.weight_updates import check_update
from tests.raising import raises
from veneer.functional.packed_bits import unpack_bits
from veneer.injection import LoadError, attach
from veneer.injection.errors import OptionError
from veneer.methods.reparameterized.binary.bi_adaptformer import BiAdaptFormer
from veneer.methods.reparameterized.binary.bi_lora import BiLoRA
from veneer.testing.case import loss

MODELS = [("timm_vit", "vit", "attn.{q,v} mlp.in"), ("diffusers_unet", "sd1", "conv.res")]
QUARTILE = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.75, dtype=torch.float64)).item()


def quantized(weight: Tensor) -> Tensor:
    """±0.674 σ + μ, whose sign has the gradient of the normalized entry."""
    mean, std = weight.mean(), weight.std()
    normal = (weight - mean) / (std + 1e-5)
    return (QUARTILE * (1 - 2 * (weight <= mean).double()) + normal - normal.detach()) * std + mean


@pytest.mark.parametrize(("host", "name", "where"), MODELS)
def test_updates_and_gradients(host: str, name: str, where: str) -> None:
    def change(adapter: Any, weight: Tensor) -> Tensor:
        return 0.3 * (quantized(adapter.up).flatten(1) @ quantized(adapter.down).flatten(1)).reshape(weight.shape)

    check_update(host, name, BiLoRA(rank=3, scale=0.3), change, where)


def test_layers_with_groups_and_dropout() -> None:
    """Both forms agree; dropout is between the factors and only in training."""
    torch.manual_seed(0)
    for base in (nn.Conv2d(4, 8, (3, 1), groups=2), nn.Conv2d(4, 8, 3, groups=4)):
        adapter = BiLoRA(rank=6).build(site_of(base)).double().eval()
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        base = base.double()
        y = base(x)
        change = adapter.weight(base.weight) - base.weight
        torch.testing.assert_close(adapter.output(x, y) - y, F.conv2d(x, change, groups=base.groups))
    adapter = BiLoRA(rank=1, dropout=0.5).build(site_of(nn.Linear(7, 6))).double()
    x, zero = torch.randn(400, 7, dtype=torch.float64), torch.zeros(400, 6, dtype=torch.float64)
    ratio = (adapter.train().output(x, zero) / adapter.eval().output(x, zero))[:, 0].round(decimals=6)
    assert set(ratio.tolist()) == {0.0, 2.0}


def test_branches_in_every_layout() -> None:
    def slow(adapter: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + 0.3 * F.linear(F.linear(x, quantized(adapter.down)).relu(), quantized(adapter.up))

    check_layouts(BiAdaptFormer(bottleneck=3, scale=0.3), branch, slow)


@pytest.mark.parametrize("method", [BiLoRA(rank=3), BiAdaptFormer(bottleneck=3)], ids=lambda m: m.name)
def test_files_have_bits_and_moments(method: Any, tmp_path: Path) -> None:
    """A loaded file computes bitwise what was saved, has two values per matrix, and trains on."""
    model, samples = tiny("timm_vit", "vit")
    model = model.float()
    sample = {key: value.float() for key, value in samples[0].items()}
    tuned = attach(model, method)
    names = {f"{n}_{what}" for n in ("down", "up") for what in ("bits", "moments")}
    assert {key.rpartition(":")[2] for key in tuned.state_dict()} == names
    path, got = tuned.save(tmp_path / "x"), loss(model, sample)
    _, adapter = next(iter(tuned.parts.values()))
    bits = unpack_bits(adapter.down_bits, adapter.down.numel()).view_as(adapter.down)
    assert torch.equal(bits, adapter.down > adapter.down.mean())
    torch.testing.assert_close(adapter.down_moments, torch.stack([adapter.down.mean(), adapter.down.std()]).detach())
    other, _ = tiny("timm_vit", "vit")
    other = other.float()
    loaded = veneer.load(other, path)
    assert torch.equal(loss(other, sample), got)
    _, again = next(iter(loaded.parts.values()))
    assert len(again.down.unique()) == 2
    torch.testing.assert_close(torch.stack([again.down.mean(), again.down.std()]), adapter.down_moments, rtol=1e-5, atol=1e-7)
    before = again.moments("down").detach().clone()
    with torch.no_grad():
        again.down.mul_(2)
    torch.testing.assert_close(again.moments("down").detach(), 2 * before, rtol=1e-5, atol=1e-7)
    spoilt = {key: -tensor.abs() if key.endswith("_moments") else tensor for key, tensor in loaded.state_dict().items()}
    with raises(LoadError, where=next(iter(loaded.parts))):
        loaded.load_state_dict(spoilt)


def test_start_and_counts() -> None:
    """Bits and moments on ViT-B/16: 147,456 bytes for q and v at rank 32, 73,728 for the MLP branches."""
    torch.manual_seed(0)
    adapter = BiLoRA(rank=50).build(site_of(nn.Linear(400, 300)))
    assert adapter.up.abs().max() <= 2e-3
    assert adapter.up.std().item() == pytest.approx(0.88e-3, rel=0.02)
    assert adapter.down.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    for name, bits, matrices in (("bi_lora", 1_179_648, 48), ("bi_adaptformer", 589_824, 24)):
        tuned = attach(vit, name)
        report = tuned.report()
        assert (report.trainable, report.stored) == (bits, bits // 8 + 2 * matrices)
        tuned.detach()


@pytest.mark.parametrize(
    ("cls", "option", "given"),
    [(BiLoRA, "rank", 0), (BiLoRA, "dropout", 1.0), (BiAdaptFormer, "bottleneck", 0), (BiAdaptFormer, "dropout", -0.1)],
)
def test_bad_options(cls: Any, option: str, given: float) -> None:
    with raises(OptionError, method=cls.name, option=option, given=given):
        cls(**{option: given})

"""SVDiff's equation, W' = U diag(relu(σ + δ)) Vᵀ, against a sum over singular triplets found by NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.hosts.published import build
from tests.methods.layers import site_of
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach, hosts
from veneer.methods.reparameterized.scale.svdiff import SVDiff, SVDiffAdapter

LAYERS = [
    nn.Linear(6, 4),
    nn.Linear(4, 7, bias=False),
    nn.Conv1d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2),
    nn.Conv2d(4, 8, 3, groups=2, bias=False),
    nn.Conv2d(4, 8, (3, 1), groups=4, dilation=2),
    nn.Conv3d(4, 2, 2),
]


def entered(base: nn.Module, trained: bool = True) -> SVDiffAdapter:
    adapter = SVDiff().build(site_of(base)).to(base.weight.dtype)
    adapter.enter(nn.Sequential(base))
    if trained:
        torch.manual_seed(0)
        nn.init.normal_(adapter.delta)
        adapter.delta.data[-1] = -2 * adapter.sigma[-1]  # so that relu has something to do
    return adapter


def shifted(weight: Tensor, delta: Tensor) -> Tensor:
    """Σ max(σ_i + δ_i, 0) u_i v_iᵀ of the weight with its kernel flattened."""
    flat = weight.detach().numpy().reshape(len(weight), -1)
    U, S, Vt = np.linalg.svd(flat, full_matrices=False)
    total = np.zeros_like(flat)
    for i in range(len(S)):
        total += max(S[i] + delta[i].item(), 0) * np.outer(U[:, i], Vt[i])
    return torch.from_numpy(total).reshape(weight.shape)


@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_the_equation_in_both_forms(base: nn.Module) -> None:
    base = copy.deepcopy(base).double()
    adapter, expected = entered(base), copy.deepcopy(base)
    expected.weight.data.copy_(shifted(base.weight, adapter.delta))
    shape = (2, 5, base.weight.shape[1]) if isinstance(base, nn.Linear) else (2, 4, *(7, 6, 5)[: base.weight.ndim - 2])
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(adapter.weight(base.weight), expected.weight)
    torch.testing.assert_close(adapter.output(x, base(x)), expected(x))


@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_a_new_adapter_is_the_identity_bitwise_and_its_count_is_the_formula(base: nn.Module) -> None:
    adapter = entered(base, trained=False)
    assert torch.equal(adapter.weight(base.weight), base.weight)
    assert list(adapter.state_dict()) == ["delta"]
    assert SVDiff().count(site_of(base)) == adapter.delta.numel() == min(base.weight.flatten(1).shape)


def test_rows_of_a_fused_weight_are_decomposed_by_themselves() -> None:
    torch.manual_seed(0)
    host = hosts.get("timm_vit")()
    model = host.tiny()["vit"]().double().eval()
    by_hand, x = copy.deepcopy(model), host.sample(model)
    tuned = attach(model, "svdiff", where="attn.{q,v} mlp.in conv.patch", sample=True)
    with torch.no_grad():
        for site, adapter in tuned.parts.values():
            adapter.delta.normal_(std=0.3)
            rows = by_hand.get_submodule(site.path).weight[slice(*site.rows) if site.rows else slice(None)]
            rows.copy_(shifted(rows, adapter.delta))
        torch.testing.assert_close(model(**x), by_hand(**x))


def test_published_count() -> None:
    """SD 1.5's UNet: 282 matrices."""
    report = attach(build("sd15"), "svdiff").report()
    assert (report.sites, report.trainable) == (282, 222_696)


def test_a_quantized_weight_is_rejected() -> None:
    base = nn.Linear(6, 4)
    base.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
    with raises(UnsupportedSite, method="svdiff", site="l", given=torch.int8):
        SVDiff().build(site_of(nn.Linear(6, 4))).enter(nn.Sequential(base))

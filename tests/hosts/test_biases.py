"""A weight's `bias` is the one that is added after it: where an input is always 1, its column of the weight is a bias, too."""

from __future__ import annotations

import pytest
import torch

from tests.hosts.cases import build, case, outputs
from veneer.injection.sites import WeightSite

# host, model, the norm whose first output is made 1, the attention of the first block
ATTENTION = [
    ("timm_vit", "vit", "blocks.0.norm1", "blocks.0.attn", ""),
    ("timm_vit", "beit", "blocks.0.norm1", "blocks.0.attn", "qv"),
    ("timm_vit", "eva", "blocks.0.norm1", "blocks.0.attn", "qv"),
    ("timm_swin", "swin", "layers.0.blocks.0.norm1", "layers.0.blocks.0.attn", ""),
    ("timm_swin", "swinv2", "patch_embed.norm", "layers.0.blocks.0.attn", "qv"),
    ("timm_swin", "swinv2_cr", "patch_embed.norm", "stages.0.blocks.0.attn", ""),
    ("timm_vit", "parallel_unbiased", "blocks.0.in_norm", "blocks.0", "mlp"),
]


@pytest.mark.parametrize(("host", "key", "norm", "path", "beside"), ATTENTION, ids=[f"{h}-{k}" for h, k, *_ in ATTENTION])
@torch.no_grad()
def test_a_constant_can_move_between_a_weight_and_its_bias(host: str, key: str, norm: str, path: str, beside: str) -> None:
    model, described = build(host, key), case(host, key).host
    model.get_submodule(norm).weight[0], model.get_submodule(norm).bias[0] = 0, 1
    inputs = described.sample(model)
    before = next(outputs(model(**inputs)))
    slices = [s for s in case(host, key).sites if isinstance(s, WeightSite) and s.rows and s.name.startswith(f"{path}.")]
    found = {s.role.split(".")[1 if beside != "mlp" else 0]: s for s in slices if s.bias and s.name.startswith(path)}
    if beside:
        assert set(found) == ({"mlp"} if beside == "mlp" else set(beside))
        assert all(s.bias_rows is None for s in found.values())
    else:
        assert set(found) == set("qkv")
    for name, site in found.items():
        owner, _, param = site.bias.rpartition(".")
        bias, shift = getattr(model.get_submodule(owner), param), torch.randn(site.d_out, dtype=torch.float64)
        bias[slice(*(site.bias_rows or (None,)))] -= shift
        moved = next(outputs(model(**inputs)))
        # what is added to all keys makes no difference to a softmax of dot products
        assert torch.allclose(moved, before, atol=1e-9) == (name == "k" and key in ("vit", "swin"))
        model.get_submodule(site.path).weight[slice(*site.rows), 0] += shift
        torch.testing.assert_close(next(outputs(model(**inputs))), before)


@pytest.mark.parametrize(("host", "key", "path"), [(h, k, f"{p}.qkv") for h, k, _, p, beside in ATTENTION if beside == "qv"])
def test_a_fused_weight_with_separate_biases_has_no_bias(host: str, key: str, path: str) -> None:
    whole = next(s for s in case(host, key).sites if isinstance(s, WeightSite) and s.name == path)
    assert (whole.bias, whole.bias_rows) == ("", None)

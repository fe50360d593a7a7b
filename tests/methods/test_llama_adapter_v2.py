"""LLaMA-Adapter V2: scales, biases and norms in copies of the weights, and prompts beside the attention."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.bottlenecks import stirred
from tests.methods.dense import loss_of, small_model
from tests.methods.test_llama_adapter import add_prompts
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.attachment.probe import tensors
from veneer.injection.errors import OptionError
from veneer.injection.sites import ParamSite, WeightSite
from veneer.methods.additive.attention.llama_adapter_v2 import LLaMAAdapterV2


def changed_tensor(site: Any, t: dict[str, Tensor], base: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Writes s ∘ W and s ∘ (b₀ + b), or a norm's tensor plus its delta, into the rows of a site."""
    if isinstance(site, ParamSite):
        new[f"{site.path}.{site.param}"] = base[f"{site.path}.{site.param}"] + t["delta"]
        return
    scale, path = 1 + t["gain"], f"{site.path}.{site.param}"
    for name, rows, change in (
        (path, site.rows, lambda w: scale[:, None] * w),
        (site.bias, site.bias_rows, lambda b: scale * (b + t["shift"])),
    ):
        whole = new.get(name, base[name])
        start, stop = rows or (0, len(whole))
        new[name] = torch.cat([whole[:start], change(base[name][start:stop]), whole[stop:]])


@pytest.mark.parametrize(("host", "key"), [("timm_vit", "vit"), ("open_clip", "vit"), ("clip_text", "clip")])
def test_values_and_gradients_are_those_of_the_equation(host: str, key: str) -> None:
    (model, inputs), (plain, _) = small_model(host, key), small_model(host, key)
    plain.requires_grad_(False)
    tuned = attach(model, "llama_adapter_v2", tokens=2)
    stirred(tuned)
    base, new, leaves = dict(plain.named_parameters()), dict[str, Tensor](), {}
    prompts = 0
    for name, (site, adapter) in tuned.parts.items():
        t = leaves[name] = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
        if isinstance(site, (WeightSite, ParamSite)):
            changed_tensor(site, t, base, new)
        else:
            prompts += 1
            add_prompts(plain.get_submodule(site.path), t["prompt"], t["gate"])
    assert prompts
    got, expected = model(**inputs), torch.func.functional_call(plain, new, (), inputs)
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    loss_of(got).backward()
    loss_of(expected).backward()
    for name, (_, adapter) in tuned.parts.items():
        for n, p in adapter.named_parameters():
            torch.testing.assert_close(p.grad, leaves[name][n].grad, rtol=1e-8, atol=1e-8)
            assert n != "gain" or p.grad.abs().max() > 0


def test_start_and_count() -> None:
    """Identity; 92,304 of prompts and gates, 13,824 of layers in each of 12 blocks of a ViT-B/16, and 36,864 of norms."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        tuned = attach(vit, "llama_adapter_v2")
        assert tuned.report().trainable == 92_304 + 12 * 13_824 + 36_864 == 295_056
    model, inputs = small_model("timm_vit", "vit")
    before = model(**inputs)
    adapters: Any = attach(model, "llama_adapter_v2").parts
    after = model(**inputs)
    assert torch.equal(after, before)
    loss_of(after).backward()
    for name, (_, adapter) in adapters.items():
        for n, p in adapter.named_parameters():
            assert bool(p.grad.any()) == (n != "prompt"), f"{name}.{n}"


def test_options_out_of_range() -> None:
    with raises(OptionError, method="llama_adapter_v2", option="tokens", given=0):
        LLaMAAdapterV2(tokens=0)

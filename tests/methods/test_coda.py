"""CoDA: blocks on the selected tokens, against blocks that are written out token by token, with their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.bottlenecks import random, stirred, stream, trained
from tests.methods.dense import loss_of, small_model
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.attachment.probe import tensors
from veneer.injection.errors import HostChanged, OptionError
from veneer.injection.registry import hosts
from veneer.methods.additive.experts.coda import Coda, soft_top_k

OPTIONS = {"ratio": 0.75, "bottleneck": 3, "epsilon": 1.0}


def written_top_k(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """λ of one sample by exp and sums, 20 steps with ε = max(4·0.7ᵗ, ε)."""
    a, b = torch.zeros(()), -scores
    for step in range(20):
        now = max(4 * 0.7**step, epsilon)
        a = now * math.log(k) - now * torch.log(torch.exp((scores + b) / now).sum())
        b = -torch.clamp(scores + a, min=0)
    return torch.exp((scores + a + b) / max(4 * 0.7**20, epsilon))


class Conditional:
    """The forward pass of a block with the equation of the paper, sample by sample and token by token."""

    def __init__(self, block: nn.Module, prefix: int, adapter: Any) -> None:
        self.block, self.prefix = block.forward, prefix
        self.leaves = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        p, t = self.prefix, self.leaves
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        normed = (x - mean) / torch.sqrt(var + 1e-5)
        k = max(1, round(OPTIONS["ratio"] * (x.shape[1] - p)))
        rows, weights = [], []
        for sample in normed:
            scores = (sample[p:] * t["router"]).sum(-1)
            best = sorted(sorted(range(len(scores)), key=lambda i: -scores[i].item())[:k])
            rows.append([*range(p), *(p + i for i in best)])
            weights.append([1.0] * p + list(written_top_k(scores, k, OPTIONS["epsilon"])[best]))
        out = self.block(torch.stack([s[r] for s, r in zip(x, rows, strict=True)]), *args, **kwargs)
        heavy = out[0] if isinstance(out, tuple) else out
        y = x + (normed @ t["down"].T + t["down_bias"]).clamp(min=0) @ t["up"].T + t["up_bias"]
        y = [list(sample) for sample in y]
        for i, row in enumerate(rows):
            for j, token in enumerate(row):
                y[i][token] = y[i][token] + weights[i][j] * (heavy[i, j] - x[i, token])
        y = torch.stack([torch.stack(sample) for sample in y])
        return (y, *out[1:]) if isinstance(out, tuple) else y


@pytest.mark.parametrize(
    ("host", "key"), [("timm_vit", "vit_registers"), ("open_clip", "vit"), ("transformers_vit", "clip"), ("diffusers_dit", "dit")]
)
def test_values_and_gradients_are_those_of_the_equation(host: str, key: str) -> None:
    (model, inputs), (plain, _) = small_model(host, key), small_model(host, key)
    plain.requires_grad_(False)
    tuned = attach(model, "coda", **OPTIONS)
    stirred(tuned)
    references = {}
    for name, (site, adapter) in tuned.parts.items():
        block: Any = plain.get_submodule(site.path)
        block.forward = Conditional(block, site.prefix_tokens, adapter)
        references[name] = block.forward.leaves
    got, expected = model(**inputs), plain(**inputs)
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    loss_of(got).backward()
    loss_of(expected).backward()
    for name, (_, adapter) in tuned.parts.items():
        for n, p in adapter.named_parameters():
            torch.testing.assert_close(p.grad, references[name][n].grad, rtol=1e-8, atol=1e-9)
        assert adapter.router.grad.abs().max() > 1e-9


def test_soft_top_k() -> None:
    """Between 0 and 1, sum k, in the order of the scores, all 1 for all tokens; its gradient is that of finite differences."""
    scores = random(3, 9).requires_grad_()
    for epsilon in (1.0, 0.3):
        weight = soft_top_k(scores, 4, epsilon, steps=200)
        assert 0 < weight.min() <= weight.max() <= 1
        torch.testing.assert_close(weight.sum(-1), torch.full((3,), 4.0, dtype=torch.float64), atol=1e-3, rtol=0)
        assert torch.equal(weight.topk(4).indices.sort().values, scores.topk(4).indices.sort().values)
    assert torch.equal(soft_top_k(scores, 9, 0.3), torch.ones_like(scores))
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, 4, 0.5), (scores,))
    assert soft_top_k(scores.half(), 4, 0.5).dtype == torch.float32


def test_only_the_selected_tokens_enter_the_block() -> None:
    """Three quarters of 16 patches and the class token; each sample has its own."""
    model, inputs = small_model("timm_vit", "vit")
    tuned = attach(model, "coda", **OPTIONS)
    lengths = []
    model.blocks[0].mlp.register_forward_hook(lambda module, args, y: lengths.append(y.shape[1]))
    with torch.no_grad():
        together = model(**inputs)
        alone = torch.cat([model(sample[None]) for sample in inputs["x"]])
        torch.testing.assert_close(together, alone)
        assert lengths == [13, 13, 13]
        with tuned.enabled(False):
            model(**inputs)
    assert lengths[-1] == 17
    adapter = trained(Coda(ratio=0.01), stream(width=5))
    assert adapter.insert(random(2, 7, 5)).shape == (2, 1, 5)


def test_prompts_are_inserted_before_the_router() -> None:
    """The block returns all tokens before prompts that were attached first are removed; the other order is an error."""
    model, inputs = small_model("timm_vit", "vit")
    attach(model, "vpt", tokens=3)
    attach(model, "coda", ratio=1.0, epsilon=10.0)
    model(**inputs)
    model, inputs = small_model("timm_vit", "vit")
    attach(model, "coda", **OPTIONS)
    attach(model, "vpt", tokens=3, where="tokens.tower")
    with raises(HostChanged, where="blocks.0.stream", given=(2, 16, 24), expected=(2, 13, 24)):
        model(**inputs)


def test_start_and_count() -> None:
    """1,198,848 of ViT-B/16 with h = 64, less a block if the class token is pooled; A(x) is zero at first."""
    for pool, blocks in (("avg", 12), ("token", 11)):
        with torch.device("meta"):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool=pool)
            assert attach(vit, "coda").report().trainable == 1_198_848 // 12 * blocks
    torch.manual_seed(0)
    adapter = Coda().build(stream(width=768))
    assert not adapter.up.any()
    assert adapter.router.std().item() == pytest.approx(768**-0.5, rel=0.1)
    x = random(2, 9, 768).float()
    chosen = adapter.insert(x)
    assert chosen.shape == (2, 4, 768)
    assert torch.equal(adapter.remove(chosen), x)


def test_options_and_hosts_that_are_not_supported() -> None:
    for option, given in {"ratio": 0.0, "bottleneck": 0, "epsilon": 0.0, "steps": 0}.items():
        with raises(OptionError, method="coda", option=option, given=given):
            Coda(**{option: given})
    for host, key in (("timm_vit", "eva"), ("transformers_vit", "dinov3"), ("clip_text", "clip")):
        with raises(UnsupportedSite, method="coda", host=host):
            attach(hosts.get(host)().tiny()[key](), "coda")

"""E2VPT: prompts among tokens, keys and values, in attention that is written out head by head, and the pruning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.attentions import projections
from tests.methods.bottlenecks import stirred
from tests.methods.dense import loss_of, small_model
from tests.raising import raises
from veneer.injection import StateError, UnsupportedSite, attach
from veneer.injection.attachment.probe import tensors
from veneer.injection.errors import OptionError
from veneer.injection.sites import Port, TokenSite
from veneer.methods.prompt.e2vpt import E2VPT, KeyValuePrompts, PrunedPrompts

OPTIONS: dict[str, Any] = {"tokens": 3, "key_values": 2, "segments": 4, "dropout": 0.0}


def read_prompts(attn: Any, prompt: Tensor) -> None:
    """Replaces attention by softmax(q [K_P; K]ᵀ / √d) [V_P; V], head by head."""
    whole = isinstance(attn, nn.MultiheadAttention) or hasattr(attn, "q_proj")

    def forward(x: Tensor, *_: Any, **__: Any) -> Any:
        parts = projections(attn)
        q, k, v = (x @ w.T + b for w, b in parts[:3])
        width, heads = prompt.shape[-1], []
        for h, rows in enumerate(prompt):
            q_h, k_h, v_h = (t[..., h * width : (h + 1) * width] for t in (q, k, v))
            k_h, v_h = (torch.cat([rows.expand(len(x), -1, -1), t], 1) for t in (k_h, v_h))
            heads.append((q_h @ k_h.mT / math.sqrt(width)).softmax(-1) @ v_h)
        y = torch.cat(heads, -1) @ parts[3][0].T + parts[3][1]
        return (y, None) if whole else y

    attn.forward = lambda *args, hidden_states=None, **kwargs: forward(args[0] if args else hidden_states, **kwargs)


def insert(block: nn.Module, prefix: int, prompt: Tensor) -> None:
    """Prompts between the prefix and the patches of one block."""

    def enter(module: nn.Module, args: Any) -> Any:
        x = args[0]
        return (torch.cat([x[:, :prefix], prompt.expand(len(x), -1, -1), x[:, prefix:]], 1), *args[1:])

    def leave(module: nn.Module, args: Any, y: Any) -> Any:
        return torch.cat([y[:, :prefix], y[:, prefix + len(prompt) :]], 1)

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave)


@pytest.mark.parametrize(("host", "key"), [("timm_vit", "vit_registers"), ("open_clip", "vit"), ("transformers_vit", "dinov2")])
def test_values_and_gradients_are_those_of_the_equation(host: str, key: str) -> None:
    (model, inputs), (plain, _) = small_model(host, key), small_model(host, key)
    plain.requires_grad_(False)
    tuned = attach(model, "e2vpt", **OPTIONS)
    stirred(tuned)
    references = {}
    for name, (site, adapter) in tuned.parts.items():
        reference = references[name] = adapter.prompt.detach().clone().requires_grad_()
        if isinstance(site, TokenSite):
            insert(plain.get_submodule(site.enter.path), site.prefix_tokens, reference)
        else:
            read_prompts(plain.get_submodule(site.path), reference)
    got, expected = model(**inputs), plain(**inputs)
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    loss_of(got).backward()
    loss_of(expected).backward()
    for name, (_, adapter) in tuned.parts.items():
        torch.testing.assert_close(adapter.prompt.grad, references[name].grad, rtol=1e-8, atol=1e-9)
        assert adapter.prompt.grad.abs().max() > 1e-9


def test_keys_and_values_are_switched_and_seen_by_other_adapters() -> None:
    model, inputs = small_model("timm_vit", "vit")
    bare, _ = small_model("timm_vit", "vit")
    tuned = attach(model, "e2vpt", **OPTIONS)
    with torch.no_grad():
        before = model(**inputs)
        with tuned.enabled(False):
            assert torch.equal(model(**inputs), bare(**inputs))
        stirred(attach(model, "lora", where="attn.qkv", rank=2))
        llama = attach(model, "llama_adapter", tokens=2)
        stirred(llama)
        assert model(**inputs).shape == before.shape
        llama.detach()
        merged = model(**inputs)
        model.get_submodule("blocks.0.attn.qkv")(torch.zeros(1, 1, 24, dtype=torch.float64))  # outside of attention
        torch.testing.assert_close(model(**inputs), merged, rtol=0, atol=0)
    with raises(StateError, given=0.5, expected=(0, 1)):
        tuned.scale = 0.5


@pytest.mark.parametrize(("host", "key"), [("timm_vit", "vit"), ("open_clip", "vit"), ("transformers_vit", "dinov2")])
def test_several_add_up(host: str, key: str) -> None:
    """Two attachments are one with the keys and values of both."""
    (model, inputs), (joint, _) = small_model(host, key), small_model(host, key)
    first, second = (attach(model, "e2vpt", name=name, key_values=n, where="attn.module") for name, n in (("a", 2), ("b", 3)))
    whole = attach(joint, "e2vpt", key_values=5, where="attn.module")
    stirred(first)
    with torch.no_grad():
        for name, (_, adapter) in whole.parts.items():
            both = [tuned.parts[name][1].prompt for tuned in (first, second)]
            adapter.prompt.copy_(torch.cat(both, 1))
        for a, b in zip(tensors(model(**inputs)), tensors(joint(**inputs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_attention_written_out_gets_prompts_among_its_tokens_only() -> None:
    """It has no softmax attention of torch that could be extended."""
    for implementation, roles in (("sdpa", {"tokens.block", "attn.module"}), ("eager", {"tokens.block"})):
        model, inputs = small_model("transformers_vit", "dinov2")
        model.set_attn_implementation(implementation)
        tuned = attach(model, "e2vpt", **OPTIONS)
        assert {site.role for site, _ in tuned.parts.values()} == roles
        model(**inputs)


def token_site(width: int = 8) -> TokenSite:
    return TokenSite(name="t", role="tokens.block", enter=Port("b", "in"), leave=Port("b", "out"), width=width)


def test_the_least_important_prompts_and_segments_become_zero() -> None:
    """Importance by masks of ones that are differentiated; the others return to their initial values; then zeros stay."""
    torch.manual_seed(0)
    method = E2VPT(tokens=4, key_values=2, segments=4, keep=0.5, keep_segments=0.25, prune_at=0.5)
    layers = [PrunedPrompts(token_site(), 4, 4, 0.0).double() for _ in range(2)]
    first = [layer.prompt.detach().clone() for layer in layers]
    weights = [torch.randn_like(p) for p in first]
    adapters: list[Any] = [(token_site(), layer) for layer in layers]
    expected_tokens, expected_segments = torch.zeros(4).double(), torch.zeros(4, 4).double()
    for step in range(1, 7):
        masks = torch.ones(4, dtype=torch.float64, requires_grad=True), torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            for layer in layers:
                layer.prompt.add_(0.1)
        products = [layer.prompt * masks[0][:, None] * masks[1].repeat(1, 2) for layer in layers]
        sum((m * w * step).sum() for m, w in zip(products, weights, strict=True)).backward()
        if step <= 3:
            expected_tokens += masks[0].grad.abs()
            expected_segments += masks[1].grad.abs()
        method.after_step(adapters, step, 6)
        for layer in layers:
            layer.prompt.grad = None
        assert (step >= 3) == any(bool((layer.prompt == 0).any()) for layer in layers)
        if step == 3:
            torch.testing.assert_close(layers[1].token_scores, expected_tokens)
            torch.testing.assert_close(layers[1].segment_scores, expected_segments)
            kept = torch.zeros(4, 8, dtype=torch.bool)
            for token in expected_tokens.topk(2).indices:
                (segment,) = expected_segments[token].topk(1).indices
                kept[token, segment], kept[token, segment + 4] = True, True
            for layer, start in zip(layers, first, strict=True):
                assert torch.equal(layer.prompt.detach(), start * kept)
    assert all(torch.equal(layer.prompt != 0, kept) for layer in layers)
    assert method.summary(adapters) == "4 of 8 prompts are zero"
    assert method.schedule_end(6) == 3
    assert E2VPT(keep=1.0, keep_segments=1.0).schedule_end(6) == 0


def test_start_and_count() -> None:
    """12·(10 + 5)·768 in a ViT-B/16; K_P is U(−v, v) with v = sqrt(6 / (n·channels of a head))."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "e2vpt").report().trainable == 138_240
    torch.manual_seed(0)
    bound = math.sqrt(6 / (3 * 16 * 16 + 768))
    prompt = PrunedPrompts(token_site(768), 50, 16, 0.0).prompt
    assert 0.999 * bound < prompt.abs().max() <= bound
    model, _ = small_model("timm_vit", "vit")
    site = next(s for s, _ in attach(model, "e2vpt", where="attn.module", key_values=200).parts.values())
    prompt = KeyValuePrompts(site, 200).prompt
    bound = math.sqrt(6 / (200 * 12))
    assert prompt.shape == (2, 200, 12)
    assert 0.999 * bound < prompt.abs().max() <= bound


def test_options_and_hosts_that_are_not_supported() -> None:
    for option, given in {
        "tokens": 0,
        "key_values": 0,
        "segments": 0,
        "keep": 0.0,
        "keep_segments": 1.5,
        "prune_at": 0.0,
    }.items():
        with raises(OptionError, method="e2vpt", option=option, given=given):
            E2VPT(**{option: given})
    with raises(OptionError, method="e2vpt", option="dropout", given=1.0):
        E2VPT(dropout=1.0)
    with raises(OptionError, method="e2vpt", option="segments", given=5):
        E2VPT(segments=5).build(token_site())
    with raises(UnsupportedSite, method="e2vpt", host="timm_vit"):
        attach(small_model("timm_vit", "eva")[0], "e2vpt")

"""LLaMA-Adapter: one matrix of probabilities with two softmaxes, the first gated, in an attention processor written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.attentions import projections
from tests.methods.bottlenecks import stirred
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach, hosts
from veneer.injection.attachment.probe import tensors
from veneer.injection.attention_sites import AttentionSite
from veneer.injection.errors import OptionError
from veneer.methods.additive.attention.llama_adapter import LLaMAAdapter


class GatedAttention:
    """Attention of a module of diffusers to its tokens and to prompts, as in the authors' code: prompts are the first keys."""

    def __init__(self, prompt: Tensor, gate: Tensor) -> None:
        self.prompt, self.gate = (p.detach().clone().requires_grad_() for p in (prompt, gate))

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        context = x if encoder_hidden_states is None else encoder_hidden_states
        context = torch.cat([self.prompt.expand(len(x), -1, -1), context], 1)
        q, k, v = (
            p.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        prompts = len(self.prompt)
        gated = self.gate.tanh()[:, None, None] * scores[..., :prompts].softmax(-1)
        out = torch.cat([gated, scores[..., prompts:].softmax(-1)], -1) @ v
        result: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2)) / attn.rescale_output_factor
        return result


def tiny(host: str, key: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = hosts.get(host)().tiny()[key]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model, hosts.get(host)().sample(model)


@pytest.mark.parametrize(
    ("host", "key", "where"),
    [("diffusers_dit", "dit", None), ("diffusers_unet", "sd1", None), ("diffusers_unet", "sd1", "xattn.processor")],
)
def test_values_and_gradients_are_those_of_the_equation(host: str, key: str, where: Any) -> None:
    (model, inputs), (plain, _) = tiny(host, key), tiny(host, key)
    before = [t.detach() for t in tensors(model(**inputs))]
    adapters: Any = stirred(attach(model, "llama_adapter", tokens=3, where=where))
    references = {}
    for name, adapter in adapters.items():
        references[name] = GatedAttention(adapter.prompt, adapter.gate)
        plain.get_submodule(name.removesuffix(".processor")).processor = references[name]
    got, expected = (list(tensors(m(**inputs))) for m in (model, plain))
    for a, b, unchanged in zip(got, expected, before, strict=True):
        torch.testing.assert_close(a, b)
        assert (b - unchanged).abs().max() > 1e-4
    for outputs in (got, expected):
        sum(t.square().sum() for t in outputs).backward()
    for name, adapter in adapters.items():
        torch.testing.assert_close(adapter.prompt.grad, references[name].prompt.grad)
        torch.testing.assert_close(adapter.gate.grad, references[name].gate.grad)
        assert adapter.prompt.grad.abs().max() > 0


def add_prompts(attn: nn.Module, prompt: Tensor, gate: Tensor) -> None:
    """Adds tanh(g) softmax(q (P W_k)ᵀ / √d) P W_v, head by head, through the output layer to what an attention returns."""

    def write(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x, parts = (args[0] if args else kwargs["hidden_states"]), projections(module)
        q, k, v = (t @ w.T + b for t, (w, b) in zip((x, prompt, prompt), parts, strict=False))
        norms = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        width = len(parts[0][0]) // len(gate)
        attended = []
        for h in range(len(gate)):
            q_h, k_h, v_h = (t[..., h * width : (h + 1) * width] for t in (q, k, v))
            q_h, k_h = (t if norm is None else norm(t) for t, norm in zip((q_h, k_h), norms, strict=True))
            attended.append(gate[h].tanh() * (q_h @ k_h.mT / math.sqrt(width)).softmax(-1) @ v_h)
        y = output[0] if isinstance(output, tuple) else output
        y = y + torch.cat(attended, -1) @ parts[3][0].T
        return (y, *output[1:]) if isinstance(output, tuple) else y

    attn.register_forward_hook(write, with_kwargs=True)


@pytest.mark.parametrize(
    ("host", "key"),
    [
        *(("timm_vit", "vit"), ("timm_vit", "beit"), ("timm_swin", "swin"), ("open_clip", "vit"), ("clip_text", "clip")),
        ("transformers_vit", "dinov2"),
    ],
)
def test_self_attention_without_a_processor(host: str, key: str) -> None:
    """Both towers of a CLIP; other adapters of the layers change queries, keys and values of the prompts, too."""
    (model, inputs), (plain, _) = tiny(host, key), tiny(host, key)
    plain.requires_grad_(False)
    before = [t.detach() for t in tensors(model(**inputs))]
    tuned = attach(model, "llama_adapter", tokens=3, where="attn.module")
    adapters: Any = stirred(tuned)
    references = {}
    for name, adapter in adapters.items():
        references[name] = [p.detach().clone().requires_grad_() for p in (adapter.prompt, adapter.gate)]
        add_prompts(plain.get_submodule(name.removesuffix(".module")), *references[name])
    got, expected = (list(tensors(m(**inputs))) for m in (model, plain))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert max((b - t).abs().max() for b, t in zip(expected, before, strict=True)) > 1e-4
    for outputs in (got, expected):
        sum(t.square().sum() for t in outputs if t.requires_grad).backward()
    for name, adapter in adapters.items():
        for p, reference in zip((adapter.prompt, adapter.gate), references[name], strict=True):
            torch.testing.assert_close(p.grad, reference.grad, rtol=1e-9, atol=1e-9)
            assert p.grad.abs().max() > 0
    lora = attach(model, "lora", where="attn.{q,k,v,out}", rank=2)
    stirred(lora)
    with torch.no_grad():
        beside = list(tensors(model(**inputs)))
        lora.merge()
        for a, b in zip(tensors(model(**inputs)), beside, strict=True):
            torch.testing.assert_close(a, b)


def test_a_new_adapter_changes_nothing_and_only_its_gates_have_gradients() -> None:
    model, inputs = tiny("diffusers_dit", "dit")
    before = model(**inputs).sample
    adapters: Any = attach(model, "llama_adapter").parts
    after = model(**inputs).sample
    assert torch.equal(after, before)
    after.square().sum().backward()
    for _, adapter in adapters.values():
        assert not adapter.prompt.grad.any()
        assert adapter.gate.grad.any()
        assert adapter.prompt.std().item() == pytest.approx(1, rel=0.15)


def test_a_layer_beside_it_changes_the_keys_of_the_prompts() -> None:
    """LoRA merged into the projections of the host is LoRA beside the prompts."""
    model, inputs = tiny("diffusers_dit", "dit")
    stirred(attach(model, "llama_adapter"))
    lora = attach(model, "lora", where="attn.{k,v}", rank=2)
    stirred(lora)
    with torch.no_grad():
        before = model(**inputs).sample
        lora.merge()
        torch.testing.assert_close(model(**inputs).sample, before)


def test_count() -> None:
    """10 prompts of width 1,152 and 16 gates, 28 times in DiT-XL/2; 92,304 in the blocks of a ViT-B/16."""
    site = AttentionSite(name="a", role="attn.processor", path="a", width=1152, context_width=64, heads=16, cross=False, index=0)
    assert 28 * LLaMAAdapter().count(site) == 28 * sum(p.numel() for p in LLaMAAdapter().build(site).parameters()) == 323_008
    vit = AttentionSite(name="a", role="attn.processor", path="a", width=768, context_width=768, heads=12, cross=False, index=0)
    assert 12 * LLaMAAdapter().count(vit) == 92_304


def test_options_and_hosts_that_are_not_supported() -> None:
    with raises(OptionError, method="llama_adapter", option="tokens", given=0):
        LLaMAAdapter(tokens=0)
    rotary = hosts.get("timm_vit")().tiny()["eva"]()
    with raises(UnsupportedSite, method="llama_adapter", host="timm_vit"):
        attach(rotary, "llama_adapter")

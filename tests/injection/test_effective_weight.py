"""The effective tensor of an adapter: the host's, with the changes of earlier attachments only."""

import torch

from tests.injection.toy import net, stir
from veneer.injection import attach
from veneer.injection.seams.effective_weight import effective_tensor


def test_only_earlier_attachments_are_included() -> None:
    model = net()
    first, second, third = (attach(model, "lora", where=w, rank=2) for w in ("attn.q", "head conv", "head attn.{q,k}"))
    for tuned in (first, second, third):
        stir(tuned)
    head, (_, adapter), (_, last) = model.head, second.parts["head"], third.parts["head"]
    assert effective_tensor(adapter, head, "weight", None) is head.weight
    torch.testing.assert_close(effective_tensor(last, head, "weight", None), adapter.weight(head.weight))
    second.scale = 0.5
    torch.testing.assert_close(
        effective_tensor(last, head, "weight", None), torch.lerp(head.weight, head.weight + adapter.delta(), 0.5)
    )
    (_, q), (site, top) = first.parts["qkv.q"], third.parts["qkv.q"]
    torch.testing.assert_close(effective_tensor(top, model.qkv, "weight", site.rows), q.weight(model.qkv.weight[:6]))
    k_site, k = third.parts["qkv.k"]
    assert torch.equal(effective_tensor(k, model.qkv, "weight", k_site.rows), model.qkv.weight[6:12])


def test_changes_of_other_tensors_are_ignored() -> None:
    model = net()
    bias = attach(model, "bitfit", where="bias.head")
    stir(bias)
    _, adapter = attach(model, "lora", where="head", rank=2).parts["head"]
    assert effective_tensor(adapter, model.head, "weight", None) is model.head.weight
    torch.testing.assert_close(
        effective_tensor(adapter, model.head, "bias", None), model.head.bias + bias.parts["head.bias"][1].delta
    )
    assert effective_tensor(adapter, model.tail[1], "bias", None) is None


def test_scaled_inputs_of_earlier_attachments_are_included() -> None:
    """A later adapter gets x as the model gives it, so that y = W diag(l) x; an earlier one gets it scaled, and y = W x."""
    model = net()
    _, first = attach(model, "lora", where="head", rank=2).parts["head"]
    scaled = attach(model, "ia3", where="head", inputs="head")
    stir(scaled)
    _, last = attach(model, "lora", where="head", rank=2).parts["head"]
    assert effective_tensor(first, model.head, "weight", None) is model.head.weight
    factor = 1 + scaled.parts["head"][1].delta
    torch.testing.assert_close(effective_tensor(last, model.head, "weight", None), model.head.weight * factor)


def test_the_bias_of_a_changed_weight_is_changed() -> None:
    """RepAdapter's b' = b + W (B a + c) with the effective W, then SSF's γ b' + β."""
    model = net()
    first, second, third = (attach(model, name, where="head") for name in ("lora", "repadapter", "ssf"))
    for tuned in (first, second, third):
        stir(tuned)
    _, adapter = attach(model, "lora", where="head", rank=2).parts["head"]
    lora, rep, ssf = (tuned.parts["head"][1] for tuned in (first, second, third))
    weight = model.head.weight + lora.delta()
    up = torch.block_diag(*rep.up.chunk(2))
    bias = (model.head.bias + weight @ (up @ rep.down_bias + rep.up_bias)) * (1 + ssf.gain) + ssf.shift
    torch.testing.assert_close(effective_tensor(adapter, model.head, "bias", None), bias)
    second.scale = third.scale = 0.0
    assert effective_tensor(adapter, model.head, "bias", None) is model.head.bias


def test_a_parametrized_weight_is_included() -> None:
    model = net()
    _, adapter = attach(model, "lora", where="head", rank=2).parts["head"]
    torch.nn.utils.parametrize.register_parametrization(model.head, "weight", torch.nn.Softmax(-1))
    assert torch.equal(effective_tensor(adapter, model.head, "weight", None), model.head.weight)

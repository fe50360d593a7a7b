"""The tensor below an adapter: the host's, with what acts before it and nothing of what acts after."""

import torch

from veneer.injection import attach
from veneer.injection.below import tensor_below

from .toy import net, stir


def test_what_acts_before_is_in_and_what_acts_after_is_not() -> None:
    model = net()
    first, second, third = (attach(model, "lora", where=w, rank=2) for w in ("attn.q", "head conv", "head attn.{q,k}"))
    for tuned in (first, second, third):
        stir(tuned)
    head, (_, own), (_, last) = model.head, second.parts["head"], third.parts["head"]
    assert tensor_below(own, head, "weight", None) is head.weight
    torch.testing.assert_close(tensor_below(last, head, "weight", None), own.weight(head.weight))
    second.scale = 0.5
    torch.testing.assert_close(tensor_below(last, head, "weight", None), torch.lerp(head.weight, head.weight + own.delta(), 0.5))
    (_, q), (site, top) = first.parts["qkv.q"], third.parts["qkv.q"]
    torch.testing.assert_close(tensor_below(top, model.qkv, "weight", site.rows), q.weight(model.qkv.weight[:6]))
    k_site, k = third.parts["qkv.k"]
    assert torch.equal(tensor_below(k, model.qkv, "weight", k_site.rows), model.qkv.weight[6:12])


def test_only_changes_of_that_tensor_count() -> None:
    model = net()
    bias = attach(model, "bitfit", where="bias.head")
    stir(bias)
    _, own = attach(model, "lora", where="head", rank=2).parts["head"]
    assert tensor_below(own, model.head, "weight", None) is model.head.weight
    torch.testing.assert_close(tensor_below(own, model.head, "bias", None), model.head.bias + bias.parts["head.bias"][1].delta)
    assert tensor_below(own, model.tail[1], "bias", None) is None


def test_scaled_inputs_have_been_seen_to() -> None:
    """x comes to the adapter scaled, so that y = W x holds for the host's own W."""
    model = net()
    stir(attach(model, "ia3", where="head", inputs="head"))
    _, own = attach(model, "lora", where="head", rank=2).parts["head"]
    assert tensor_below(own, model.head, "weight", None) is model.head.weight


def test_a_parametrised_weight_is_below_every_hook() -> None:
    model = net()
    _, own = attach(model, "lora", where="head", rank=2).parts["head"]
    torch.nn.utils.parametrize.register_parametrization(model.head, "weight", torch.nn.Softmax(-1))
    assert torch.equal(tensor_below(own, model.head, "weight", None), model.head.weight)

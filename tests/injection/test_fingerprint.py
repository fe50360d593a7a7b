"""Fingerprint and identity of base models."""

import copy

import torch

from tests.injection.test_attachment import train_once
from tests.injection.toy import Net, net, stir
from veneer.injection import attach
from veneer.injection.attachment.fingerprint import SAMPLES, fingerprint, identity


def test_a_cast_keeps_the_fingerprint_and_a_sign_changes_it() -> None:
    model = net()
    with torch.no_grad():
        model.head.weight[0, 0] = -1e-30  # rounds to −0 in half precision
    whole = fingerprint(model)
    assert whole is not None
    assert len(whole) == 64
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert fingerprint(copy.deepcopy(model).to(dtype)) == whole
    with torch.no_grad():
        model.head.weight[2, 5] *= -1
    assert fingerprint(model) != whole


def test_names_and_shapes_count() -> None:
    class Renamed(torch.nn.Module):
        def __init__(self, **children: torch.nn.Module) -> None:
            super().__init__()
            for name, child in children.items():
                self.add_module(name, child)

    ones = torch.nn.Linear(2, 3, bias=False)
    torch.nn.init.ones_(ones.weight)
    transposed = torch.nn.Linear(3, 2, bias=False)
    torch.nn.init.ones_(transposed.weight)
    prints = [fingerprint(m) for m in (Renamed(a=ones), Renamed(b=ones), Renamed(a=transposed))]
    assert len(set(prints)) == 3


def test_large_tensors_are_sampled_evenly() -> None:
    layer = torch.nn.Linear(SAMPLES, 4, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1)
        before = fingerprint(layer)
        layer.weight.view(-1)[1:4] = -1  # between samples
        assert fingerprint(layer) == before
        layer.weight.view(-1)[4] = -1
        assert fingerprint(layer) != before


def test_models_on_meta_or_with_quantized_weights_have_no_fingerprint() -> None:
    with torch.device("meta"):
        assert fingerprint(Net()) is None
    model = net()
    model.read.weight = torch.nn.Parameter(model.read.weight.to(torch.int8), requires_grad=False)
    assert fingerprint(model) is None


def test_adapters_and_training_are_not_the_base() -> None:
    model = net()
    bare = fingerprint(model)
    first = attach(model, "lora", where="conv attn.{q,out}", rank=2, train="head")
    second = attach(model, "lora", where="attn.v", rank=2, train="head norm")
    train_once(model)
    for tuned in (first, second):
        stir(tuned, 5.0)
    assert fingerprint(model) == bare
    first.detach()
    assert fingerprint(model) == bare


def test_tensors_that_a_file_carries_are_left_out() -> None:
    one, other = net(), net()
    with torch.no_grad():
        other.head.weight.neg_()
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one, without=["head.weight"]) == fingerprint(other, without=["head.weight"])


def test_identity_names_class_and_sizes() -> None:
    model = net()
    model.config = {"width": 6, "sides": (4, 4), "_private": 1, "act": "gelu", "eps": 1e-5, "flag": True, "none": []}
    assert identity(model) == {"class": "Net", "config": {"sides": [4, 4], "width": 6}, "fingerprint": fingerprint(model)}

"""LION: fixed points of a map over the whole width, and the implicit gradient by a linear system."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.bottlenecks import random, stirred, stream
from tests.methods.dense import loss_of, small_model
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.lion import Lion


def written_map(t: dict[str, Tensor], contraction: float, y: Tensor, z: Tensor) -> Tensor:
    """f(z, y) = Up tanh(Down(LN(y) + z)) with both matrices divided by the same number, over the whole width."""
    mean, var = y.mean(-1, keepdim=True), y.var(-1, unbiased=False, keepdim=True)
    normed = (y - mean) / torch.sqrt(var + 1e-5)
    slope = t["down"].square().sum().sqrt() * t["up"].square().sum().sqrt()
    factor = (contraction / slope) ** 0.5 if slope > contraction else 1.0
    low = (normed + z) @ (factor * t["down"]).T + t["down_bias"]
    return torch.tanh(low) @ (factor * t["up"]).T + t["up_bias"]


class WrittenLayer(torch.autograd.Function):
    """z* by 300 steps; gradients by the implicit function theorem, with the Jacobian of each token as a matrix."""

    names = ("down", "up", "down_bias", "up_bias")

    @staticmethod
    def forward(ctx: Any, y: Tensor, contraction: float, *params: Tensor) -> Tensor:
        z = torch.zeros_like(y)
        for _ in range(300):
            z = written_map(dict(zip(WrittenLayer.names, params, strict=True)), contraction, y, z)
        ctx.contraction = contraction
        ctx.save_for_backward(y, z, *params)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, z, *params = ctx.saved_tensors
        with torch.enable_grad():
            y, *params = (p.detach().requires_grad_() for p in (y, *params))
            t = dict(zip(WrittenLayer.names, params, strict=True))

            def one(y: Tensor, z: Tensor) -> Tensor:
                return written_map(t, ctx.contraction, y, z)

            flat_y, flat_z = y.detach().flatten(0, -2), z.flatten(0, -2)
            jacobians = torch.func.vmap(torch.func.jacrev(one, argnums=1))(flat_y, flat_z).detach()
            eye = torch.eye(z.shape[-1], dtype=z.dtype)
            solved = torch.linalg.solve((eye - jacobians).mT, grad.flatten(0, -2)[..., None])[..., 0].view_as(grad)
            grads = torch.autograd.grad(one(y, z), (y, *params), solved)
        return grads[0], None, *grads[1:]


def test_fixed_points_and_implicit_gradients_in_a_vit() -> None:
    """Before the first block, and at the pooled features; with a slope at the bound, and below it."""
    for scale in (0.3, 0.02):
        (model, inputs), (plain, _) = small_model("timm_vit", "vit"), small_model("timm_vit", "vit")
        plain.requires_grad_(False)
        tuned = attach(model, "lion", bottleneck=3, steps=60)
        assert list(tuned.parts) == ["blocks.0.stream", "head.features"]
        stirred(tuned)
        with torch.no_grad():
            for p in tuned.parameters():
                p.mul_(scale / 0.3)
        leaves = {}
        for name, (_, adapter) in tuned.parts.items():
            leaves[name] = [getattr(adapter, n).detach().clone().requires_grad_() for n in WrittenLayer.names]
            module = plain.get_submodule("blocks.0" if name.startswith("blocks") else "head")
            module.register_forward_pre_hook(lambda m, args, p=leaves[name]: (args[0] + WrittenLayer.apply(args[0], 0.7, *p),))
        got, expected = model(**inputs), plain(**inputs)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
        assert (got - small_model("timm_vit", "vit")[0](**inputs)).abs().max() > 1e-3
        loss_of(got).backward()
        loss_of(expected).backward()
        for name, (_, adapter) in tuned.parts.items():
            for n, reference in zip(WrittenLayer.names, leaves[name], strict=True):
                torch.testing.assert_close(getattr(adapter, n).grad, reference.grad, rtol=1e-6, atol=1e-8)


def test_steps_approach_the_fixed_point_by_the_contraction() -> None:
    torch.manual_seed(0)
    layers = [Lion(bottleneck=4, contraction=0.5, steps=steps).build(stream(width=6)).double() for steps in (1, 5, 60)]
    with torch.no_grad():
        for layer in layers:
            for i, p in enumerate(layer.parameters()):
                p.copy_(random(*p.shape, seed=i) * 3)
        y = random(2, 5, 6)
        one, five, many = (layer.output(y, y) for layer in layers)
        torch.testing.assert_close(five, many, atol=0.5**5 * 6, rtol=0)
        assert (five - many).norm() < 0.5**3 * (one - many).norm()
        down, up = layers[0].contracted()
        assert torch.linalg.matrix_norm(down, 2) * torch.linalg.matrix_norm(up, 2) <= 0.5 + 1e-9
        assert down.norm() * up.norm() == pytest.approx(0.5)


def test_the_least_important_weights_become_zero() -> None:
    """Those of the smallest smoothed |w · ∂L/∂w|, in each matrix, after half of the steps."""
    method = Lion(bottleneck=2, keep=0.25)
    layer: Any = method.build(stream(width=4)).double()
    weights = {"down": random(2, 4, seed=1), "up": random(4, 2, seed=2)}
    with torch.no_grad():
        for name, value in weights.items():
            getattr(layer, name).copy_(value)
    for step in range(1, 5):
        scores = {}
        for name in weights:
            p = getattr(layer, name)
            p.grad = random(*p.shape, seed=3) * (p != 0)
            scores[name] = (weights[name] * p.grad).abs()
        if step == 2:
            expected = {name: weights[name] * (s >= s.flatten().topk(2).values.min()) for name, s in scores.items()}
        method.after_step([(stream(), layer)], step, 4)
        for name in weights:
            target = weights[name] if step < 2 else expected[name]
            assert torch.equal(getattr(layer, name).detach(), target)
    assert method.summary([(stream(), layer)]) == "12 of 16 weights are zero"
    with torch.no_grad():
        layer.up.add_(1.0)
    method.finalize([(stream(), layer)])
    assert int((layer.up != 0).sum()) == 2
    assert (method.schedule_end(4), Lion(keep=1.0).schedule_end(4)) == (2, 0)


def test_start_and_count() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=10)
        assert attach(vit, "lion").report().trainable == 2 * (2 * 768 * 64 + 64 + 768) == 198_272
    model, inputs = small_model("timm_vit", "vit")
    before = model(**inputs)
    attach(model, "lion")
    assert torch.equal(model(**inputs), before)


def test_options_out_of_range() -> None:
    invalid = {"bottleneck": 0, "contraction": 1.0, "steps": 0, "keep": 0.0, "prune_at": 1.5}
    for option, given in invalid.items():
        with raises(OptionError, method="lion", option=option, given=given):
            Lion(**{option: given})

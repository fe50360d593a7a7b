"""Mixtures of experts that stop gradients in evaluation mode: HiDream-I1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.hosts.diffusers_dit import DiffusersDiT
from veneer.injection.host import Host

HOST = DiffusersDiT()


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return HOST.tiny()["hidream"]()


def mixtures(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "MOEFeedForwardSwiGLU"]


def gradients(model: nn.Module, inputs: dict[str, Any], parameters: list[nn.Parameter]) -> list[Tensor]:
    output = model(**inputs, return_dict=False)[0]
    generator = torch.Generator().manual_seed(3)
    return list(torch.autograd.grad((output * torch.randn(output.shape, generator=generator)).sum(), parameters))


def test_gradients_are_those_of_experts_in_training_mode(model: Any) -> None:
    """Of adapters before the experts and on them, in evaluation mode, by the hooks of the attachment alone."""
    inputs = HOST.sample(model)
    lora = veneer.attach(model, "lora", rank=2, where=("attn.{q,v}", "mlp.{in,gate,out}"))
    with torch.no_grad():
        for i, parameter in enumerate(lora.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(i), std=0.1)
    parameters = [*lora.parameters()]
    assert not model.training
    ours = gradients(model, inputs, parameters)
    assert all(gradient.abs().sum() > 0 for gradient in ours)
    assert {name.split(".ff_i.")[-1] for name in lora.parts if "experts.2" in name} == {
        "experts.2.w1",
        "experts.2.w2",
        "experts.2.w3",
    }
    for module in mixtures(model):
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        module.training = True
    reference = gradients(model, inputs, parameters)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_outputs_and_modes_are_those_without_gradients(model: Any) -> None:
    inputs = HOST.sample(model)
    veneer.attach(model, "lora", rank=2)
    with_gradients = model(**inputs, return_dict=False)[0].detach()
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], with_gradients, rtol=1e-5, atol=1e-5)


def test_two_attachments_restore_the_mode_also_after_an_error_and_leave_no_hook(model: Any) -> None:
    inputs, hooks = HOST.sample(model), [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in mixtures(model)]
    several = [veneer.attach(model, "lora", rank=2, name=name) for name in ("a", "b")]
    modes: list[bool] = []
    for module in mixtures(model):
        module.experts[0].register_forward_pre_hook(lambda module, args: modes.append(module.training))  # type: ignore[index]
        module.gate.register_forward_pre_hook(lambda gate, args, parent=module: modes.append(parent.training))  # type: ignore[union-attr]
    model(**inputs)
    assert modes == [True, False] * 3  # the mixture trains, its experts do not
    assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError):
        model(**{**inputs, "hidden_states": inputs["hidden_states"][:, :3]})
    fail = mixtures(model)[1].shared_experts.register_forward_pre_hook(lambda module, args: 1 / 0)  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    fail.remove()
    assert not any(module.training for module in model.modules())
    for attachment in several:
        attachment.detach()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in mixtures(model)] == hooks


def test_experts_have_no_gradients_without_the_hooks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error shows it, because the shared expert and the residual stream have some."""
    monkeypatch.setattr(DiffusersDiT, "gradient_hooks", Host.gradient_hooks)
    lora = veneer.attach(model, "lora", rank=2, where="mlp.out")
    model(**HOST.sample(model), return_dict=False)[0].sum().backward()
    trained = {name.split(".ff_i.")[-1] for name, (_, adapter) in lora.parts.items() if adapter.up.grad is not None}
    assert trained == {"shared_experts.w2"}


def test_experts_forced_to_inference_also_train() -> None:
    record = HOST.record(HOST.tiny()["hidream"]())
    assert record is not None
    model = record.build(**record.tiny["hidream"], force_inference_output=True)
    lora = veneer.attach(model, "lora", rank=2, where="mlp.out")
    assert all(gradient is not None for gradient in gradients(model, HOST.sample(model), [*lora.parameters()]))
    assert all(module._force_inference_output for module in mixtures(model))

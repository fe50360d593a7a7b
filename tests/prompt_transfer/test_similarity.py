"""Similarities of prompts against sums over all pairs, and activated neurons against a tower run block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.classifiers import tiny as tiny_clip
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.registry import hosts
from veneer.prompt_transfer import (
    StoredPromptError,
    activated_neurons,
    average_similarity,
    neuron_overlap,
    read_prompts,
    token_similarity,
)
from veneer.prompt_transfer.stored_prompts import check_comparable
from veneer.testing.case import perturb


def vit() -> Any:
    torch.manual_seed(0)
    return hosts.get("timm_vit")().tiny()["vit"]().eval()


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt()))


def prompts(seed: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.randn(tokens, 5, generator=generator) + 0.5 for site in ("blocks.0", "blocks.1")}


def test_similarities() -> None:
    first, second = prompts(0, 3), prompts(1, 4)
    average = sum(cosine(first[s].sum(0), second[s].sum(0)) for s in first) / 2
    pairs = sum(cosine(p, q) for s in first for p in first[s] for q in second[s]) / 24
    assert average_similarity(first, second) == pytest.approx(average, abs=1e-6)
    assert token_similarity(first, second) == pytest.approx(pairs, abs=1e-6)
    assert average_similarity(first, first) == pytest.approx(1)
    assert token_similarity(first, first) < 0.9
    assert abs(average - pairs) > 0.01


def test_prompts_of_files(tmp_path: Path) -> None:
    tuned = attach(vit(), "vpt", tokens=3)
    stored = read_prompts(tuned.save(tmp_path / "deep"))
    assert {*stored} == {*tuned.parts}
    assert all(torch.equal(stored[name], adapter.prompt) for name, (_, adapter) in tuned.parts.items())
    by_class = attach(tiny_clip(), "coop", tokens=4, by_class=True)
    (context,) = read_prompts(by_class.save(tmp_path / "classes")).values()
    assert torch.equal(context, by_class.parts["head.prompts"][1].context.flatten(0, 1).float())


def test_files_without_prompts_and_other_models(tmp_path: Path) -> None:
    lora = attach(vit(), "lora").save(tmp_path / "lora")
    with raises(StoredPromptError, file=lora, where="prompts", given=("lora",)):
        read_prompts(lora)
    first = prompts(0, 3)
    check_comparable(first, prompts(1, 9), "b")
    for other in ({"blocks.0": first["blocks.0"]}, {site: prompt[:, 1:] for site, prompt in first.items()}):
        with raises(
            StoredPromptError, file="b", where="prompts", given={site: prompt.shape[1] for site, prompt in other.items()}
        ):
            check_comparable(first, other, "b")


def test_activated_neurons_of_the_class_token() -> None:
    model = vit()
    tuned = attach(model, "vpt", tokens=3)
    perturb(tuned, size=0.5)
    images = hosts.get("timm_vit")().sample(model)["x"]
    got = activated_neurons(model, [images[:1], images[1:]])
    wanted = []
    for block in model.blocks:
        states: list[Tensor] = []
        handle = block.mlp.register_forward_pre_hook(lambda module, args, states=states: states.append(args[0]))
        with torch.no_grad():
            model(images)
            wanted.append(states[0][:, 0] @ block.mlp.fc1.weight.T + block.mlp.fc1.bias > 0)
        handle.remove()
    assert torch.equal(got, torch.cat(wanted, 1))
    assert 0.1 < got.float().mean() < 0.9
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("fc1"))


def test_overlap() -> None:
    a, b = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(), torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    assert neuron_overlap(a, b) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert neuron_overlap(a, a) == pytest.approx(1)


def test_a_convolutional_network_has_no_such_neurons() -> None:
    model = hosts.get("timm_conv")().tiny()["resnet"]()
    with raises(StoredPromptError, where="mlp.in"):
        activated_neurons(model, [])

"""The projector of prompts against its formula, and its training against end-to-end gradients."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.methods.classifiers import pictures, tiny
from tests.raising import raises
from veneer.injection import LoadError, OptionError, attach
from veneer.prompt_transfer import PromptProjector, StoredPromptError, minimize_distance, read_soft_prompt, tune_on_task
from veneer.prompt_transfer.projector import KEY


def projector(by_token: bool = False, tokens: int = 3, target: int = 4) -> PromptProjector:
    torch.manual_seed(1)
    return PromptProjector(tokens, 5, target, hidden=6, by_token=by_token).double()


def prompt(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def explicit(weights: dict[str, Tensor], source: Tensor) -> Tensor:
    """W_2 LeakyReLU(W_1 x + b_1) + b_2 of one vector, with its sums written out."""
    hidden = (weights["first.weight"] * source).sum(1) + weights["first.bias"]
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    return (weights["second.weight"] * hidden).sum(1) + weights["second.bias"]


def test_all_tokens_together_or_each_alone() -> None:
    source, weight = prompt(3, 5), prompt(3, 4, seed=3)
    for by_token in (False, True):
        ours = projector(by_token)
        weights = {name: p.detach().clone().requires_grad_() for name, p in ours.named_parameters()}
        rows = list(source) if by_token else [source.reshape(-1)]
        wanted = torch.cat([explicit(weights, row) for row in rows]).view(3, 4)
        torch.testing.assert_close(ours(source), wanted)
        (ours(source) * weight).sum().backward()
        (wanted * weight).sum().backward()
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, weights[name].grad, msg=name)
            assert weights[name].grad.abs().max() > 0
    assert sum(p.numel() for p in projector().parameters()) == (3 * 5 + 1) * 6 + (6 + 1) * 3 * 4
    assert projector(by_token=True)(prompt(7, 5)).shape == (7, 4)


def test_counts_of_the_reference() -> None:
    """Widths 384 and 768, each token alone: 886,272 parameters."""
    with torch.device("meta"):
        ours = PromptProjector(100, 384, 768, by_token=True)
    assert sum(p.numel() for p in ours.parameters()) == 384 * 768 + 768 + 768 * 768 + 768 == 886_272


def test_distance_to_prompts_of_several_tasks() -> None:
    pairs = [(prompt(3, 5, seed=seed), prompt(3, 4, seed=seed + 10)) for seed in range(2)]
    ours, other = projector(), projector()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.0)
    wanted = []
    for _ in range(3):
        distances = [sum((a - b) ** 2 for a, b in zip(other(s).flatten(), t.flatten(), strict=True)) for s, t in pairs]
        loss = (distances[0] + distances[1]) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    assert minimize_distance(ours, pairs, 3, 0.05) == pytest.approx(wanted)
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert minimize_distance(ours, pairs, 200, 0.05)[-1] < wanted[0] / 100


def test_task_tuning_is_end_to_end() -> None:
    """The gradient at the prompt of the model, propagated through the projector, is that of one graph."""
    model: Any = tiny()
    adapter: Any = attach(model, "prompt_tuning", tokens=3).parts["head.prompts"][1]
    source, images, labels = prompt(3, 5), pictures(count=4), torch.tensor([0, 1, 2, 0])
    ours = projector(target=adapter.context.shape[1])
    other, trained = copy.deepcopy(ours), adapter.context
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
    path = next(name for name, p in model.named_parameters() if p is trained)
    wanted = []
    for step in range(3):
        rows = slice(step % 2, None)
        logits = torch.func.functional_call(model, {path: other(source)}, (images[rows],))
        loss = F.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    model.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p is not trained}
    got = tune_on_task(
        ours, source, trained, lambda step: F.cross_entropy(model(images[step % 2 :]), labels[step % 2 :]), 3, 0.01
    )
    assert got == pytest.approx(wanted)
    assert wanted[2] != pytest.approx(wanted[0])
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(trained.detach(), other(source).detach())
    assert trained.grad is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if p is not trained)


def test_file(tmp_path: Path) -> None:
    ours = projector().float()
    path = ours.save(tmp_path, {"source": {"fingerprint": "a"}})
    assert path == tmp_path / "projector.safetensors"
    for each in (path, tmp_path):
        loaded, models = PromptProjector.load(each)
        assert models == {"source": {"fingerprint": "a"}}
        assert torch.equal(loaded(prompt(3, 5).float()), ours(prompt(3, 5).float()))
    assert all(p.requires_grad for p in loaded.parameters())


def test_damaged_files(tmp_path: Path) -> None:
    tensors = load_file(projector().float().save(tmp_path))
    options = {"tokens": 3, "source_width": 5, "target_width": 4, "hidden": 6, "by_token": False, "models": {}}
    for name, entries, where in (
        ("none", {}, KEY),
        ("text", {KEY: json.dumps({**options, "hidden": "6"})}, KEY),
        ("zero", {KEY: json.dumps({**options, "tokens": 0})}, KEY),
        ("huge", {KEY: json.dumps({**options, "hidden": 10**15})}, "tensors"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors", entries)
        with raises(LoadError, file=tmp_path / f"{name}.safetensors", where=where):
            PromptProjector.load(tmp_path / f"{name}.safetensors")


def test_sizes() -> None:
    for option in ("tokens", "source_width", "target_width", "hidden"):
        with raises(OptionError, option=option, given=0):
            PromptProjector(**{"tokens": 3, "source_width": 5, "target_width": 4, "hidden": 6, option: 0})
    with raises(OptionError, option="prompt", given=(4, 5), expected=(3, 5)):
        projector()(prompt(4, 5))
    with raises(OptionError, option="prompt", given=(3, 4), expected=(3, 5)):
        projector(by_token=True)(prompt(3, 4))


def test_soft_prompts_of_files(tmp_path: Path) -> None:
    tuned = attach(tiny().float(), "prompt_tuning", tokens=3)
    stored = read_soft_prompt(tuned.save(tmp_path / "tuning"))
    assert torch.equal(stored.vectors, tuned.parts["head.prompts"][1].context)
    assert (stored.site, stored.where) == ("head.prompts", ("prompts",))
    assert stored.base == read_soft_prompt(attach(tiny().float(), "coop", tokens=3).save(tmp_path / "coop")).base
    other = tiny().float()
    with torch.no_grad():
        next(p for p in other.parameters() if p.ndim > 1).neg_()
    assert read_soft_prompt(attach(other, "prompt_tuning", tokens=3).save(tmp_path / "other")).base != stored.base
    for name, options in (("lora", {}), ("coop", {"tokens": 2, "by_class": True}), ("coop", {"tokens": 2, "position": "front"})):
        path = attach(tiny().float(), name, **options).save(tmp_path / f"{name}-{options.get('position')}")
        with raises(StoredPromptError, file=path, where="prompts"):
            read_soft_prompt(path)

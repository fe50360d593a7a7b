"""HyperFormer++: y + LN(Up(gelu(Down(y)))) with parameters of one hypernetwork, against plain torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import veneer
from tests.methods.bottlenecks import picture, stirred, tiny
from tests.methods.hypernetworks import SMALL, Leaves, change, check_model, hooked
from tests.raising import raises
from veneer.injection import StateError, attach
from veneer.injection.errors import OptionError, UnknownName
from veneer.methods.additive.hyper.hyperformer_plus_plus import HyperFormerPlusPlus


@pytest.mark.parametrize(
    ("host", "key"), [("timm_vit", "vit"), ("timm_convnext", "convnext"), ("diffusers_dit", "dit"), ("open_clip", "vit")]
)
def test_outputs_and_gradients_of_each_task(host: str, key: str) -> None:
    pair = hooked(host, key)
    tuned = attach(pair[1], "hyperformer_plus_plus", tasks=("cats", "dogs"), **SMALL)
    sites: list[Any] = [site for site, _ in tuned.parts.values()]
    layers = sorted({(site.tower, site.depth) for site in sites})
    roles = sorted({site.role for site in sites})

    def reference(leaves: Leaves, task: int, site: Any, y: Tensor) -> Tensor:
        layer, role = layers.index((site.tower, site.depth)), roles.index(site.role)
        parts = [leaves["tasks"][task], leaves["layers"][layer], leaves["positions"][role]]
        return change(leaves, f"all-{site.width}", parts, True, y)

    check_model(host, key, tuned, pair, reference)


def test_published_counts() -> None:
    """2,760,280 for one task, 512 for each further one; materialized 12 · 2 pairs with h = 24 and their norms."""
    with torch.device("meta"):
        for tasks, expected in ((("a",), 2_760_280), (("a", "b", "c"), 2_761_304)):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0)
            assert attach(vit, "hyperformer_plus_plus", tasks=tasks).report().trainable == expected
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        tuned = attach(vit, "hyperformer_plus_plus", tasks=("a",), materialized=True)
        assert tuned.report().trainable == 24 * (2 * 768 * 24 + 24 + 3 * 768)


def test_initial_values() -> None:
    """Matrices normal with 0.01, biases zero, embeddings normal with 1."""
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    tuned = attach(vit, "hyperformer_plus_plus", tasks=tuple("abcdefgh"))
    shared: Any = next(iter(tuned.parts.values()))[1].shared
    for name, p in shared.named_parameters():
        if name == "norm.weight":
            assert torch.equal(p, torch.ones_like(p))
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            expected = 1.0 if name in ("tasks", "layers", "positions") else 0.01
            assert p.std().item() == pytest.approx(expected, rel=0.1), name


def test_materialized_adapters_of_one_task_compute_the_same(tmp_path: Path) -> None:
    model = tiny()
    twin = copy.deepcopy(model)
    tuned = attach(model, "hyperformer_plus_plus", tasks=("cats", "dogs"), **SMALL)
    stirred(tuned)
    whole = tuned.save(tmp_path / "whole")
    tuned.task = "cats"
    other = model(picture())
    tuned.task = "dogs"
    expected = model(picture())
    tuned.materialize("dogs")
    assert torch.equal(model(picture()), expected)
    assert (other - expected).abs().max() > 1e-3
    assert tuned.method == HyperFormerPlusPlus(("dogs",), **SMALL, materialized=True)
    assert tuned.task == "dogs"
    assert not any("shared" in name for name, _ in tuned.named_parameters())
    again = veneer.load(twin, tuned.save(tmp_path / "dogs"))
    assert torch.equal(twin(picture()), expected)
    assert (tmp_path / "dogs.safetensors").stat().st_size < whole.stat().st_size
    again.detach()
    loaded = veneer.load(twin, whole)
    assert loaded.task is None
    loaded.task = "cats"
    assert torch.equal(twin(picture()), other)


def test_a_forward_pass_needs_a_task() -> None:
    model = tiny()
    tuned = attach(model, "hyperformer_plus_plus", tasks=("cats", "dogs"), **SMALL)
    with raises(StateError, where="hyperformer_plus_plus", given=None, expected=("cats", "dogs")):
        model(picture())
    with raises(UnknownName, name="dog", kind="task", close=("dogs",), expected=("cats", "dogs")):
        tuned.task = "dog"
    tuned.probe()
    assert tuned.task is None
    with tuned.enabled(False):
        model(picture())
    lora = attach(model, "lora")
    lora.task = "cats"  # LoRA shares its parameters
    assert (lora.task, lora.tasks) == (None, ())
    with raises(StateError, where="lora", given="lora", expected="needs_tasks"):
        lora.materialize("cats")


@pytest.mark.parametrize(
    ("option", "given"),
    [("reduction", 0), ("embedding", 0), ("hidden", 0), ("projected", 0), ("act", "tanh"), ("tasks", ("a", "a"))],
)
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="hyperformer_plus_plus", option=option, given=given):
        HyperFormerPlusPlus(**{option: given})


def test_without_tasks_it_cannot_be_attached() -> None:
    with raises(OptionError, method="hyperformer_plus_plus", option="tasks", given=()):
        attach(tiny(), "hyperformer_plus_plus")
    with raises(OptionError, method="hyperformer_plus_plus", option="tasks", given=("a", "b")):
        HyperFormerPlusPlus(("a", "b"), materialized=True)

"""AdapterDrop: y + Up(ReLU(Down(y))) from layer n on, with n sampled for each step, against blocks that are written out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import veneer
from tests.methods.bottlenecks import blocks_written_out, branch, picture, stirred
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.bottleneck.adapter_drop import AdapterDrop, DroppedBottleneck, sample_layers, skip_layers
from veneer.training.attach_methods import skip_lower_layers

STEPS = 40


def deep(layers: int = 4) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", depth=layers, **options).double().eval()


def expected(bare: Any, adapters: dict[str, Any], n: int, leaves: dict[str, dict[str, Tensor]]) -> Tensor:
    """Blocks in which layers n and later have adapters."""

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x = x + b.attn(b.norm1(x))
        y = b.mlp(b.norm2(x))
        if depth < n:
            return x + y
        t = leaves[f"blocks.{depth}.mlp.branch"]
        return x + y + torch.relu(y @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]

    return blocks_written_out(bare, block, picture(16))


@pytest.mark.parametrize("n", [0, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_layers_below_n_have_no_adapter(n: int, training: bool) -> None:
    """In training by the sample, in evaluation by `skip_layers`; values and gradients."""
    bare, model = deep(), deep()
    tuned = attach(model, "adapter_drop", reduction=4)
    adapters: dict[str, Any] = {**stirred(tuned)}
    leaves = {
        a: {k: p.detach().clone().requires_grad_() for k, p in adapter.named_parameters()} for a, adapter in adapters.items()
    }
    if training:
        model.train()
        step = next(s for s in range(2, 100) if sample_layers(0, s, 3) == n)
        tuned.after_step(step - 1, 100)
    else:
        skip_layers(tuned, n)
    want, got = expected(bare, adapters, n, leaves), model(picture(16))
    torch.testing.assert_close(got, want)
    want.square().sum().backward()
    got.square().sum().backward()
    for name, adapter in adapters.items():
        for k, p in adapter.named_parameters():
            assert (p.grad is None) == (int(name.split(".")[1]) < n)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, leaves[name][k].grad)


def test_skipped_layers_are_saved(tmp_path: Path) -> None:
    """Set by option or after training; the loaded adapters act from layer n on in evaluation mode only."""
    model = deep()
    tuned = attach(model, "adapter_drop", reduction=4)
    stirred(tuned)
    every = model(picture(16))
    skip_layers(tuned, 2)
    upper = model(picture(16))
    twin, drops = deep(), [tuned]
    drops.append(veneer.load(twin, tuned.save(tmp_path / "upper")))
    assert drops[1].method.config()["skip"] == 2
    torch.testing.assert_close(twin(picture(16)), upper, rtol=0, atol=0)
    skip_lower_layers(drops, 0)
    torch.testing.assert_close(model(picture(16)), upper, rtol=0, atol=0)
    skip_layers(drops[1], 0)
    torch.testing.assert_close(twin(picture(16)), every, rtol=0, atol=0)
    assert (every - upper).abs().max() > 1e-3
    skip_lower_layers(drops, 3)
    assert [drop.method.config()["skip"] for drop in drops] == [3, 3]
    with raises(OptionError, option="skip", given=-1):
        skip_layers(tuned, -1)
    lora = attach(deep(), "lora", rank=1)
    with raises(OptionError, option="layers", where="lora", given="lora", expected="adapter_drop"):
        skip_layers(lora, 1)
    with raises(OptionError, option="skip_layers", given=("lora",), expected="adapter_drop"):
        skip_lower_layers([lora], 1)


def test_the_backward_pass_stops_at_layer_n() -> None:
    """No feature before layer n requires a gradient."""
    model = deep()
    tuned = attach(model, "adapter_drop")
    model.train()
    seen: list[bool] = []
    for b in model.blocks:
        b.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    for n in range(4):
        step = next(s for s in range(2, 200) if sample_layers(0, s, 3) == n)
        tuned.after_step(step - 1, 200)
        seen.clear()
        model(picture(16)).sum().backward()
        assert seen == [depth >= n for depth in range(4)]


def samples(tuned: Any, steps: range) -> list[int]:
    """n of each step, from all adapters, which agree."""
    found = []
    for step in steps:
        (n,) = {adapter.first_layer() for _, adapter in tuned.parts.values()}
        found.append(n)
        tuned.after_step(step, STEPS)
    return found


def test_samples_are_a_function_of_seed_and_step() -> None:
    """Equal in another process, whatever its random state, from the first step on."""
    first = samples(attach(deep(), "adapter_drop", seed=5), range(1, STEPS + 1))
    torch.manual_seed(99)
    torch.randn(7)
    assert samples(attach(deep(), "adapter_drop", seed=5), range(1, STEPS + 1)) == first
    assert first == [sample_layers(5, step, 3) for step in range(1, STEPS + 1)]
    assert samples(attach(deep(), "adapter_drop", seed=6), range(1, STEPS + 1)) != first


def test_a_resumed_run_has_the_same_samples() -> None:
    """From the training state of a checkpoint, on a model that was converted to another dtype."""
    tuned = attach(deep(), "adapter_drop", seed=5)
    samples(tuned, range(1, 6))
    state = {name: adapter.get_buffer("lowest").clone() for name, (_, adapter) in tuned.parts.items()}
    later = samples(tuned, range(6, STEPS + 1))
    model = deep().float()
    resumed = attach(model, "adapter_drop", seed=5)
    model.double()
    for name, (_, adapter) in resumed.parts.items():
        assert isinstance(adapter, DroppedBottleneck)
        assert adapter.training_buffers == ("lowest",)
        adapter.lowest.copy_(state[name])
    assert samples(resumed, range(6, STEPS + 1)) == later
    assert len(set(later)) > 1


def test_samples_are_uniform() -> None:
    counts = Counter(sample_layers(0, step, 11) for step in range(12_000))
    assert set(counts) == set(range(12))
    assert all(abs(count - 1000) < 150 for count in counts.values())  # five standard deviations


def test_the_largest_n() -> None:
    for most, allowed in ((0, {0}), (1, {0, 1}), (-1, {0, 1, 2, 3}), (9, {0, 1, 2, 3})):
        tuned = attach(deep(), "adapter_drop", most=most)
        assert set(samples(tuned, range(1, STEPS + 1))) == allowed


def test_layers_are_counted_among_the_adapted_ones() -> None:
    tuned = attach(deep(), "adapter_drop", where="mlp@2:")
    layers = {site.depth: adapter.layer for site, adapter in tuned.parts.values() if isinstance(adapter, DroppedBottleneck)}
    assert layers == {2: 0, 3: 1}


@pytest.mark.parametrize(("where", "expected"), [(None, 894_528), ("mlp@5:", 521_808)])
def test_published_counts(where: str | None, expected: int) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "adapter_drop", where=where).report().trainable == expected


def test_initial_values() -> None:
    torch.manual_seed(0)
    adapter: Any = AdapterDrop().build(branch(width=320))
    assert adapter.down.shape == (20, 320)
    for weight in (adapter.down, adapter.up):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(p.any() for name, p in adapter.named_parameters() if "bias" in name)


@pytest.mark.parametrize(("option", "given"), [("reduction", 0), ("most", -2), ("skip", -1)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="adapter_drop", option=option, given=given):
        AdapterDrop(**{option: given})

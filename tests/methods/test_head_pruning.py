"""Head pruning: gates of the attention heads against an attention that is written out, the pruning schedule, and its errors."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from tests.raising import raises
from veneer.formats import load, save
from veneer.injection import OptionError, UnsupportedSite, attach
from veneer.injection.errors import VeneerError
from veneer.methods.selective.structures.head_pruning import HeadGates, HeadPruning
from veneer.training.loop.ema import EMA


def vit(heads: int = 4, depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": depth, "num_heads": heads, "num_classes": 5}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape).eval().double()
    return model


def gates_of(model: nn.Module, depth: int) -> HeadGates:
    """The adapter of a block's attention."""
    block = model.get_submodule(f"blocks.{depth}")
    return next(module for module in block.modules() if isinstance(module, HeadGates))


def gated_attention(attn: nn.Module, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Σ_h g_h · softmax(q_h k_hᵀ / √d) v_h W_hᵀ + b, head by head."""
    q, k, v = nn.functional.linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, -1)  # type: ignore[operator, arg-type]
    size = x.shape[-1] // len(gates)
    out = attn.proj.bias.expand_as(x)  # type: ignore[union-attr, operator]
    for head, gate in enumerate(gates):
        part = slice(head * size, (head + 1) * size)
        attention = (q[..., part] @ k[..., part].mT / size**0.5).softmax(-1)
        out = out + gate * (attention @ v[..., part]) @ attn.proj.weight[:, part].T  # type: ignore[union-attr, index]
    return out


def test_gates_scale_the_heads_and_so_do_the_gradients() -> None:
    model = vit()
    attach(model, "head_pruning")
    adapter = gates_of(model, 1)
    assert isinstance(adapter, HeadGates)
    adapter.double().gates.data = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    expected_gates = adapter.gates.detach().clone().requires_grad_()
    expected = gated_attention(model.blocks[1].attn, x, expected_gates)  # type: ignore[index, union-attr]
    output = model.blocks[1].attn(x)  # type: ignore[index, union-attr, operator]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(adapter.gates.grad, expected_gates.grad, rtol=1e-10, atol=1e-10)


def test_the_weight_form_has_the_gates_in_the_columns() -> None:
    adapter = HeadGates(24, 4).double()
    adapter.gates.data = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    weight, x = torch.randn(7, 24, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(x @ adapter.weight(weight).T, adapter.input(x) @ weight.T)


def test_vit_b16_has_144_gates() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", pretrained=False)
    tuned = attach(model, "head_pruning")
    assert sum(p.numel() for p in tuned.parameters()) == 144


def train(model: nn.Module, method: HeadPruning, steps: int = 20) -> list[HeadGates]:
    tuned = attach(model, method)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        pixels = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(pixels).square().sum().backward()
        optimizer.step()
        tuned.after_step(step, steps)
    return [gates_of(model, depth) for depth in range(len(model.blocks))]  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_the_share_of_heads_that_remains_is_met_exactly(keep: float) -> None:
    layers = train(vit(depth=4), HeadPruning(keep=keep))
    left = torch.stack([layer.gates != 0 for layer in layers])
    assert int(left.sum()) == round(keep * 16)
    assert left.any(1).all(), "every layer keeps a head"


def test_a_head_without_effect_is_pruned_first() -> None:
    model = vit()
    proj = model.blocks[0].attn.proj  # type: ignore[index, union-attr]
    proj.weight.data[:, 6:12] = 0  # type: ignore[union-attr, index]
    first, second = train(model, HeadPruning(keep=7 / 8))
    assert (first.gates == 0).tolist() == [False, True, False, False]
    assert (second.gates != 0).all()


def test_averaged_gates_of_pruned_heads_are_zero_after_finalize() -> None:
    """EMA remembers gates from before the pruning; the file of a run has none of them."""
    model = vit(depth=4)
    tuned = attach(model, HeadPruning(keep=0.5))
    gates = dict(tuned.named_parameters())
    ema, optimizer = EMA(gates, 0.99), torch.optim.SGD(gates.values(), lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        tuned.after_step(step + 1, 20)
        ema.update(step)
    with ema.swapped():
        assert all((gate != 0).all() for gate in gates.values())
        kept = {name: gate.detach().clone() for name, gate in gates.items()}
        for _ in range(2):
            tuned.finalize()
        left = torch.stack([*gates.values()]) != 0
        assert int(left.sum()) == 8
        assert torch.equal(torch.stack([*gates.values()]), torch.stack([*kept.values()]) * left)


@pytest.mark.parametrize(("steps", "end"), [(1, 1), (7, 4), (20, 12)])
def test_the_schedule_ends_with_the_last_pruning(steps: int, end: int) -> None:
    model, method = vit(depth=4), HeadPruning(keep=0.5, final=0.4, every=2)
    tuned = attach(model, method)
    assert method.schedule_end(steps) == end
    for step in range(1, end + 1):
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        tuned.after_step(step, steps)
    assert sum(int((p == 0).sum()) for p in tuned.parameters()) == 8


@pytest.mark.parametrize("option", ["keep", "at_least", "warmup", "final", "every"])
def test_options_of_the_schedule_hold_for_all_layers(option: str) -> None:
    value = {"keep": 0.5, "at_least": 2, "warmup": 0.2, "final": 0.1, "every": 2}[option]
    with raises(UnsupportedSite, option="by_site", given=(option,)):
        attach(vit(), "head_pruning", by_site={"attn.out": {option: value}})


def test_all_heads_remain_without_pruning() -> None:
    assert all((layer.gates != 0).all() for layer in train(vit(), HeadPruning(keep=1)))


def test_gates_of_another_number_of_heads_are_rejected(tmp_path: object) -> None:
    file = f"{tmp_path}/gates.safetensors"
    save(attach(vit(), "head_pruning"), file)
    with pytest.raises(VeneerError):
        load(vit(heads=2), file)


@pytest.mark.parametrize(
    ("option", "value"),
    [("keep", 0.0), ("keep", 1.5), ("at_least", 0), ("warmup", -0.1), ("final", 0.95), ("every", 0)],
)
def test_invalid_options(option: str, value: float) -> None:
    with raises(OptionError, option=option, given=value):
        HeadPruning(**{option: value})  # type: ignore[arg-type]

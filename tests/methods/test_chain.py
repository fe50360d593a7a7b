"""State from block to block in both methods that have it: recomputed, twice before a backward pass, interrupted, copied."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.raising import raises
from veneer.injection import Attachment, HostChanged, attach, attachments
from veneer.injection.composition.mixed_batch import mixed
from veneer.testing.case import perturb

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2, "num_classes": 10}
OPTIONS: dict[str, dict[str, Any]] = {"dtl": {"conv": 3, "write_from": 2}, "lst": {"reduction": 2}}
both = pytest.mark.parametrize("method", list(OPTIONS))


def vit(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SHAPE).to(dtype).eval()


def tuned_vit(method: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Attachment]:
    model = vit(dtype)
    tuned = attach(model, method, **OPTIONS[method])
    perturb(tuned)
    return model, tuned


def picture(seed: int, rows: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def side(tuned: Attachment) -> Any:
    return next(iter(tuned.parts.values()))[1].shared


def regions(model: Any, sizes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A pass in which this many blocks at a time are recomputed in the backward pass."""

    def run(x: Tensor) -> Tensor:
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        start = 0
        for size in sizes:
            x = checkpoint(nn.Sequential(*model.blocks[start : start + size]), x, use_reentrant=False)
            start += size
        return model.forward_head(model.norm(x))

    return run


def score(y: Tensor) -> Tensor:
    return y.float().square().sum()


def gradients(tuned: Attachment) -> list[Tensor]:
    found = [p.grad.clone() for p in tuned.parameters() if p.grad is not None]
    for p in tuned.parameters():
        p.grad = None
    return found


@both
@pytest.mark.parametrize("sizes", [(1,) * 6, (2, 2, 2), (1, 3, 2), (6,)])
def test_two_passes_before_their_backward_passes(method: str, sizes: tuple[int, ...]) -> None:
    """Each is recomputed with the state of its own pass, in any order."""
    model, tuned = tuned_vit(method)
    expected = []
    for seed in (1, 2):
        score(model(picture(seed))).backward()
        expected.append(gradients(tuned))
    run = regions(model, sizes)
    for order in ((0, 1), (1, 0)):
        losses = [score(run(picture(seed))) for seed in (1, 2)]
        for i in order:
            losses[i].backward()
            for got, wanted in zip(gradients(tuned), expected[i], strict=True):
                torch.testing.assert_close(got, wanted)
        assert sum(e.abs().sum() for e in expected[0]) > 0


@both
def test_run_again_on_a_base_of_half_precision(method: str) -> None:
    """The adapter casts a block's input, and still recognizes it."""
    model, tuned = tuned_vit(method, torch.bfloat16)
    x = picture(1, dtype=torch.bfloat16)
    score(model(x)).backward()
    expected = gradients(tuned)
    score(regions(model, (1,) * 6)(x)).backward()
    for got, wanted in zip(gradients(tuned), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@both
def test_a_graph_that_is_kept_gives_its_gradients_twice(method: str) -> None:
    model, tuned = tuned_vit(method)
    loss = score(model(picture(1)))
    loss.backward(retain_graph=True)
    first = gradients(tuned)
    loss.backward()
    for got, wanted in zip(gradients(tuned), first, strict=True):
        assert torch.equal(got, wanted)


@both
def test_reentrant_checkpointing_is_rejected(method: str) -> None:
    """It runs the pass without a graph, so that the state beside the stream would lose its gradient."""
    model, _ = tuned_vit(method)
    x = model.norm_pre(model._pos_embed(model.patch_embed(picture(1)))).requires_grad_()
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=True)
    streams = [f"blocks.{i}.stream" for i in range(len(model.blocks))]
    with pytest.raises(HostChanged) as caught:
        score(x).backward()
    assert (caught.value.where, caught.value.expected) in zip(streams[1:], streams, strict=False)


@both
def test_a_block_by_itself_is_rejected(method: str) -> None:
    model, _ = tuned_vit(method)
    tokens = torch.zeros(2, 17, 24, dtype=torch.float64)
    with raises(HostChanged, where="blocks.3.stream", expected="blocks.2.stream"):
        model.blocks[3](tokens)
    model.blocks[0](tokens)
    with raises(HostChanged, where="blocks.2.stream", expected="blocks.1.stream"):
        model.blocks[2](tokens)


@both
@pytest.mark.parametrize("grad", [True, False])
def test_an_interrupted_pass_leaves_no_state(method: str, grad: bool) -> None:
    model, _ = tuned_vit(method)
    with torch.no_grad():
        expected = model(picture(2))

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("broken off")

    handle = model.blocks[4].register_forward_pre_hook(fail)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="broken off"):
        model(picture(1))
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(picture(2)), expected)


@both
@pytest.mark.parametrize("sizes", [None, (1,) * 6, (2, 2, 2)])
def test_no_state_of_a_pass_is_kept_after_it(method: str, sizes: tuple[int, ...] | None) -> None:
    model, tuned = tuned_vit(method)
    run = model if sizes is None else regions(model, sizes)
    y = run(picture(1))
    nodes = weakref.ref(y)
    score(y).backward()
    del y
    gc.collect()
    running = side(tuned).running
    assert nodes() is None
    assert not [t for now in running.now.values() for t in now.state if t.grad_fn is not None]
    assert not [kept for kept in running.kept.values() if kept.state]
    with torch.no_grad():
        model(picture(2))
    assert not running.now
    if sizes is None:
        running.prune()
        assert not running.kept


@both
def test_a_forward_pass_without_backward_is_released(method: str) -> None:
    """Its features are freed with its output; the state of the side network when the next pass begins."""
    model, tuned = tuned_vit(method)
    inside = []
    handle = model.blocks[3].mlp.register_forward_hook(lambda m, args, y: inside.append(weakref.ref(y)))
    y = model(picture(1))
    handle.remove()
    running = side(tuned).running
    assert len(running.kept) == 6
    del y
    gc.collect()
    assert inside[0]() is None
    running.prune()
    assert not running.kept


@both
def test_without_gradients_nothing_is_stored(method: str) -> None:
    model, tuned = tuned_vit(method)
    expected = model(picture(1)).detach()
    side(tuned).running.kept.clear()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(picture(1)), expected)
    assert not side(tuned).running.kept


@both
def test_a_copy_during_a_pass_has_separate_state(method: str) -> None:
    model, tuned = tuned_vit(method)
    loss = score(model(picture(1)))
    twin = copy.deepcopy(model)
    (other,) = attachments(twin)
    assert side(other) is not side(tuned)
    assert not side(other).running.kept
    with torch.no_grad():
        assert torch.equal(twin(picture(2)), model(picture(2)))
    loss.backward()
    assert all(p.grad is None for p in other.parameters())
    assert len(gradients(tuned)) == len(list(tuned.parameters()))


@both
def test_each_sample_of_a_mixed_batch_has_separate_state(method: str) -> None:
    """The same adapter acts on two groups of rows, block by block in turns."""
    model, tuned = tuned_vit(method)
    second = attach(model, method, name="second", **OPTIONS[method])
    perturb(second, seed=5)
    x = picture(1, rows=4)
    alone = []
    with torch.no_grad():
        for row, (a, b) in enumerate([(1.0, 0.0), (0.0, 0.0), (0.5, 0.0), (1.0, 1.0)]):
            tuned.scale, second.scale = a, b
            alone.append(model(x[row : row + 1]))
        tuned.scale = second.scale = 1.0
        with mixed(model, [tuned, None, {tuned: 0.5}, [tuned, second]]):
            got = model(x)
        torch.testing.assert_close(got, torch.cat(alone))
        torch.testing.assert_close(model(x[3:]), alone[3])


@both
def test_training_compiles_to_one_graph(method: str) -> None:
    model, tuned = tuned_vit(method)
    score(model(picture(1))).backward()
    expected = gradients(tuned)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        score(compiled(picture(1))).backward()
        for got, wanted in zip(gradients(tuned), expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert not side(tuned).running.now
    torch._dynamo.reset()

"""AutoFreeze: which blocks are frozen and when, against the rule written out; the backward pass, resume, and bad loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.runs import DEPTH, STEPS, batch_of, check_resume, vit
from tests.methods.selections import tiny
from tests.raising import raises
from veneer.benchmarks import freezing
from veneer.injection import Attachment, attach
from veneer.injection.errors import OptionError, StateError
from veneer.methods.selective.tensors.autofreeze import AutoFreeze
from veneer.testing.case import loss

METHOD = AutoFreeze(intervals=6, percentile=60)


def depth_of(name: str) -> int:
    """-1 before the blocks, the number of blocks after them."""
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    return -1 if name.startswith(("patch_embed", "cls_token", "pos_embed")) else DEPTH


def plain_run(model: nn.Module) -> tuple[list[int], dict[str, Tensor]]:
    """The first trained block after each step, and the parameters at the end, of a loop without veneer."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    starts, start, before, length = [], 0, None, STEPS // METHOD.intervals
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(STEPS):
        images, targets = batch_of(step)
        nn.functional.mse_loss(model(images), targets).backward()
        for name, p in model.named_parameters():
            if start and depth_of(name) < start:
                p.grad = None
            else:
                sums[name] += p.grad
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % length == 0:
            now = [float(sum(t.abs().sum() for name, t in sums.items() if depth_of(name) == block)) for block in range(DEPTH)]
            if before is not None:
                ratios = [abs(a - b) / a if a else 0.0 for a, b in zip(before, now, strict=True)]
                threshold = np.percentile(ratios[start:], METHOD.percentile)
                start = next(block for block in range(start, DEPTH) if ratios[block] >= threshold * (1 - 1e-12))
            before, sums = now, {name: torch.zeros_like(t) for name, t in sums.items()}
        starts.append(start)
    return starts, {name: p.detach() for name, p in model.named_parameters()}


def first_trained(tuned: Attachment) -> int:
    """The first trained block; every earlier parameter must be frozen, and no later one."""
    frozen = {name: bool(adapter.frozen) for name, (_, adapter) in tuned.parts.items()}  # type: ignore[union-attr, arg-type]
    depths = {name: site.depth for name, (site, _) in tuned.parts.items()}
    start = next(block for block in range(DEPTH) if not all(frozen[n] for n, depth in depths.items() if depth == block))
    for name, (site, _) in tuned.parts.items():
        assert frozen[name] == (start > 0 and depth_of(f"{site.path}.{site.param}".lstrip(".")) < start), name
    return start


def test_a_run_freezes_the_blocks_of_the_rule() -> None:
    starts, expected = plain_run(vit())
    assert len(set(starts)) > 2, "the run of this test freezes blocks twice"
    model = vit()
    tuned = attach(model, METHOD)
    optimizer = torch.optim.SGD(tuned.parameters(), 0.05)
    assert tuned.report().summary == f"0 of {DEPTH} blocks frozen"
    graphs: list[bool] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda m, x, y: graphs.append(y.requires_grad))
    for step in range(STEPS):
        tuned.begin_pass(0, step)
        graphs.clear()
        images, targets = batch_of(step)
        nn.functional.mse_loss(model(images), targets).backward()
        start = starts[step - 1] if step else 0
        assert graphs == [block >= start for block in range(DEPTH)], "the backward pass ends at the first trained block"
        optimizer.step()
        tuned.after_step(step + 1, STEPS)
        optimizer.zero_grad()
        assert first_trained(tuned) == starts[step]
    assert tuned.report().summary == f"{starts[-1]} of {DEPTH} blocks frozen"
    tuned.merge()
    for name, tensor in tuned.host_state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path) -> None:
    """Stopped within an interval, with some blocks frozen already."""
    stopped = check_resume(METHOD, tmp_path, stop=9)
    assert any(bool(t) for name, t in stopped.named.items() if name.endswith(":frozen"))


@pytest.mark.parametrize(("percentile", "first"), [(0, 0), (50, 2), (70, 3), (100, 4)])
def test_the_percentile_of_the_changes(percentile: float, first: int) -> None:
    """Changes of 0.1, 0.2, 0.3, 0.35 and 0.5: numpy's percentiles with linear interpolation."""
    model = vit()
    tuned = attach(model, AutoFreeze(intervals=2, percentile=percentile))
    for step, sizes in ((1, [1.0] * 5), (2, [1.1, 1.2, 1.3, 0.65, 1.5])):
        for site, adapter in tuned.parts.values():
            size = 1.0 if site.depth is None else sizes[site.depth]
            adapter.value.grad = torch.full_like(adapter.value, size)  # type: ignore[union-attr, arg-type]
        tuned.after_step(step, 2)
    assert first_trained(tuned) == first


def test_a_unet_freezes_its_first_blocks() -> None:
    model, samples = tiny("diffusers_unet", "sd1")
    tuned = attach(model, "autofreeze")
    freezing.freeze(tuned, 0.5)
    loss(model, samples[0]).backward()
    depths = sorted({site.depth for site, _ in tuned.parts.values() if site.depth is not None})
    trained = {site.depth for site, adapter in tuned.parts.values() if adapter.value.grad is not None}  # type: ignore[union-attr]
    assert {depth for depth in trained if depth is not None} == set(depths[round(0.5 * len(depths)) :])


def test_a_loop_without_the_calls_of_the_schedule_is_an_error() -> None:
    model = vit()
    tuned = attach(model, "autofreeze")
    with raises(StateError, given="training", expected="begin_pass"):
        model(batch_of(0)[0])
    tuned.begin_pass(0, 0)
    model(batch_of(0)[0])
    with raises(StateError, given=0, expected=1):
        tuned.begin_pass(0, 1)
    tuned.after_step(1, 4)
    tuned.begin_pass(0, 1)


def test_counts() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(model, "autofreeze").report().trainable == 85_798_656


@pytest.mark.parametrize(("option", "given"), [("head_rate", 0.0), ("intervals", 1), ("percentile", -1.0), ("percentile", 101.0)])
def test_bad_options(option: str, given: Any) -> None:
    with raises(OptionError, method="autofreeze", option=option, given=given):
        AutoFreeze(**{option: given})

"""AutoFreeze beside its authors' rule, which is a part of their training loop."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import torch

from tests.parity.measure import Row
from tests.parity.oracle import Repository, options
from veneer.injection.sites import ParamSite
from veneer.methods.selective.tensors.autofreeze import AutoFreeze, FreezableAdapter

ORACLE = Repository("YuhanLiu11/AutoFreeze", "44d65c2b766aa35afc3874c34db14f70e4167637")
METHODS = ("autofreeze",)
START, END = (
    "                        threshold_dict = {}",
    "                        prev_intermediate_grad_dict = current_grad_dict\n",
)
LAYERS, INTERVALS = 12, 10


def rows() -> list[Row]:
    """Share of 1,000 decisions that differ: the lowest trained layer after each interval, at four percentiles."""
    text = ORACLE.read("freeze_intermediate_e2e_lr.py")
    begin = text.index(START)
    rule = compile(textwrap.dedent(text[begin : text.index(END, begin)]), "freeze_intermediate_e2e_lr.py", "exec")
    generator = torch.Generator().manual_seed(0)
    wrong = total = above = 0
    for percentile in (30, 50, 70, 90):
        for _ in range(25):
            for ours, theirs in _run(rule, percentile, generator):
                wrong, total, above = wrong + (ours != theirs), total + 1, above + (theirs > 0)
    assert above > total / 4
    return [Row("autofreeze", f"{total:,} decisions which layers to freeze", wrong / total)]


def _run(rule: Any, percentile: int, generator: torch.Generator) -> list[tuple[int, int]]:
    sites = [ParamSite(name=f"b{d}", role="bias", depth=d, path="m", param="p", shape=(8,)) for d in range(LAYERS)]
    parts: Any = [(site, FreezableAdapter(site)) for site in sites]
    state: dict[str, Any] = {"np": np, "start_layer": 0, "args": options(percentile=percentile), "print": lambda *text: None}
    method, before, decisions = AutoFreeze(intervals=INTERVALS, percentile=percentile), None, []
    for interval in range(INTERVALS):
        norms = {}
        for depth, (_, adapter) in enumerate(parts):
            adapter.value.grad = torch.rand(8, generator=generator) if depth >= state["start_layer"] else None
            norms[depth] = 0.0 if adapter.value.grad is None else float(torch.norm(adapter.value.grad, p=1))
        if before is not None:
            state.update(prev_intermediate_grad_dict=before, current_grad_dict=norms)
            exec(rule, state)
        before = norms
        method.after_step(parts, interval + 1, INTERVALS)
        lowest = next(depth for depth, (_, adapter) in enumerate(parts) if not bool(adapter.frozen))
        decisions.append((lowest, state["start_layer"]))
    return decisions

"""What each attention head does: the pattern of its map, and how a measurement changes without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.injection.seams.attention_call import AttentionCall

from .attention_calls import visit_attention
from .disabled_heads import How, without_heads
from .layers import AttentionLayer
from .patterns import HeadPattern, pattern_of

LARGEST_MAP = 2**20
"""Largest number of entries of a map that is stored; self-attention over more than 1,024 tokens has no pattern."""
Measure = Callable[[], dict[str, float]]
"""Runs the model and returns measurements by name."""


@dataclass(frozen=True)
class HeadReport:
    """One head.

    Args:
        layer: name of the attention layer. `depth`: of its block. `head`: index, from 0.
        pattern: of its mean map; None if the map was too large to store.
        changes: how disabled (`uniform`, `zero`) to the change of each measurement, without the head minus with it.
    """

    layer: str
    depth: int | None
    head: int
    pattern: HeadPattern | None
    changes: dict[str, dict[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def mean_maps(layers: Sequence[AttentionLayer], run: Callable[[], object]) -> dict[str, Tensor]:
    """The mean map of each layer over all calls and the batch, (heads, queries, keys), by name of the layer.

    Layers whose maps have more than `LARGEST_MAP` entries are left out.

    Args:
        run: runs the model.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    @torch.no_grad()
    def visit(layer: AttentionLayer, call: AttentionCall) -> Tensor:
        queries, keys = call.query.shape[-2], call.key.shape[-2]
        if queries * keys <= LARGEST_MAP:
            maps = call.map().flatten(0, -4).double()
            total = maps.sum(0).cpu()
            sums[layer.name] = total + sums[layer.name] if layer.name in sums else total
            counts[layer.name] = counts.get(layer.name, 0) + len(maps)
        return call.output()

    with visit_attention(layers, visit):
        run()
    return {name: total / counts[name] for name, total in sums.items()}


def study_heads(
    layers: Sequence[AttentionLayer],
    maps: dict[str, Tensor],
    measure: Measure,
    ways: Sequence[How] = ("uniform", "zero"),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, float], list[HeadReport]]:
    """Disables one head after the other and measures the model each time.

    Args:
        maps: of `mean_maps`. `ways`: how heads are disabled. `progress`: called with measurements done and in all.
    Returns:
        The measurements of the whole model, and a report for each head.
    """
    whole = measure()
    total, done = sum(layer.heads for layer in layers) * len(ways), 0
    reports = []
    for layer in layers:
        for head in range(layer.heads):
            changes: dict[str, dict[str, float]] = {}
            for way in ways:
                without = _measure_without(layer, head, way, measure)
                changes[way] = {name: without[name] - value for name, value in whole.items()}
                done += 1
                progress(done, total)
            mean = maps.get(layer.name)
            pattern = None if mean is None else pattern_of(mean[head], layer.prefix_tokens, layer.grid)
            reports.append(HeadReport(layer.name, layer.depth, head, pattern, changes))
    return whole, reports


def _measure_without(layer: AttentionLayer, head: int, way: How, measure: Measure) -> dict[str, float]:
    with visit_attention([layer], lambda _, call: without_heads(call, (head,), way)):
        return measure()

"""Attach on FLUX: LoRA onto every attention projection of a fresh transformer on the meta device.

On `meta` no weight is there to be read, so that the time is the machinery's own: finding sites, building adapters, joining
them. `peft` makes its matrices on the CPU unless `low_cpu_mem_usage` is given, which is the like-for-like contender.
"""

from __future__ import annotations

from functools import partial

from . import peers
from .contest import Contender, Contest
from .shapes import Shape, flux


def contests(shape: Shape, rank: int) -> list[Contest]:
    """One contest; each timing has a model of its own, made before the clock starts."""
    fresh = partial(flux, shape.flux)
    ways = [Contender("veneer", lambda model: peers.with_veneer(model, rank), fresh)]
    pairs: list[tuple[str, str]] = []
    if peers.has_peft():
        peers.check_equal(peers.with_veneer(fresh(), rank), peers.with_peft(fresh(), rank, low_cpu_mem_usage=True))
        light = "peft, low_cpu_mem_usage"
        ways += [
            Contender("peft", lambda model: peers.with_peft(model, rank), fresh),
            Contender(light, lambda model: peers.with_peft(model, rank, low_cpu_mem_usage=True), fresh),
        ]
        pairs = [("veneer", "peft"), ("veneer", light)]
    blocks = f"{shape.flux.get('num_layers', 19)} + {shape.flux.get('num_single_layers', 38)} blocks"
    return [Contest("attach", f"LoRA of rank {rank} on a FLUX transformer of {blocks}, on meta", tuple(ways), tuple(pairs))]

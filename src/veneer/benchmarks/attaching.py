"""Time to attach LoRA to every attention projection, or to every linear layer, of a FLUX transformer on the meta device.

On `meta` there are no weights, so that only the overhead is timed: finding sites, building and attaching adapters. `peft`
allocates its matrices on the CPU without `low_cpu_mem_usage`; with it, the comparison is like for like.
"""

from __future__ import annotations

from functools import partial

from . import peers
from .interleaved_timing import Contender, Contest
from .shapes import Shape, flux


def contests(shape: Shape, rank: int) -> list[Contest]:
    """Two contests; each timing uses a new model, built before the clock starts."""
    model = flux(shape.flux)
    return [
        _contest(shape, rank, "attach", "every attention projection", peers.where(model), peers.targets(model)),
        _contest(shape, rank, "attach, all linears", "every linear layer", ("*",), peers.linears(model)),
    ]


def _contest(shape: Shape, rank: int, name: str, what: str, ours: tuple[str, ...], theirs: list[str] | str) -> Contest:
    fresh = partial(flux, shape.flux)
    ways = [Contender("veneer", lambda model: peers.with_veneer(model, rank, ours), fresh)]
    pairs: list[tuple[str, str]] = []
    if peers.has_peft():
        light = partial(peers.with_peft, rank=rank, at=theirs, low_cpu_mem_usage=True)
        peers.check_equal(peers.with_veneer(fresh(), rank, ours), light(fresh()))
        ways += [
            Contender("peft", lambda model: peers.with_peft(model, rank, theirs), fresh),
            Contender("peft, low_cpu_mem_usage", light, fresh),
        ]
        pairs = [("veneer", way.name) for way in ways[1:]]
    blocks = f"{shape.flux.get('num_layers', 19)} + {shape.flux.get('num_single_layers', 38)} blocks"
    description = f"attach LoRA of rank {rank} to {what} of a FLUX transformer with {blocks}, on meta"
    return Contest(name, description, tuple(ways), tuple(pairs))

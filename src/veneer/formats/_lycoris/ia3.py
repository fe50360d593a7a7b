"""(IA)³ in the LyCORIS format."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from veneer.injection.adapter_forms import InputAdapter

from .codec import AdapterGroup, Codec, LycorisModule, Shapes, SiteTensors, put, spans, take

EVERY, NONE = "*", ""  # role patterns of (IA)³'s `inputs`


class IA3Codec(Codec):
    """`weight` w (d,) or (1, d, 1, 1), `on_input` (): W' = W diag(1 + w) for on_input = 1, else W' = diag(1 + w) W.

    A fused projection is split by rows, or all slices share one w of the inputs; to be written, they must share it. ComfyUI does
    not read (IA)³; A1111 and Forge do.
    """

    method: ClassVar[str] = "ia3"
    algo: ClassVar[str] = "ia3"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "on_input")

    def matches(self, shapes: Shapes) -> bool:
        return "on_input" in shapes

    def read(self, module: LycorisModule) -> list[SiteTensors]:
        w, flag = module.parts.get("weight"), module.parts["on_input"]
        module.expect(w is not None and flag.numel() == 1, "weight and a scalar on_input")
        assert w is not None
        w, inputs = w.flatten(), bool(flag)
        width = module.first.d_in if inputs else module.rows
        module.expect(w.numel() == width, f"weight ({width},) for its {'inputs' if inputs else 'outputs'}")
        rows = spans(module.place)
        parts = {s.name: w if inputs else take(w, rows[s.name]) for s in module.place.sites}
        some = [s for s in module.place.sites if parts[s.name].any()] or list(module.place.sites)
        return [SiteTensors(s, {"inputs": EVERY if inputs else NONE}, {"delta": parts[s.name]}) for s in some]

    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        deltas = {name: a.delta.detach() for name, a in group.adapters.items()}
        inputs = {isinstance(a, InputAdapter) for a in group.adapters.values()}
        first = next(iter(deltas.values()))
        if inputs == {False}:
            zeros = {s.name: first.new_zeros(s.d_out) for s in group.place.sites}
            w = put(group.place, {**zeros, **deltas})
        elif inputs == {True} and len(deltas) == len(group.place.sites) and all(torch.equal(d, first) for d in deltas.values()):
            w = first
        else:
            raise group.error(
                f"is a slice of '{group.place.names[0]}', one weight in this format, but its slices scale their inputs "
                "differently",
                given=group.place.names[0],
                expected="scales",
            )
        shape = (1, -1, *group.ones) if group.site.kind == "conv" else (-1,)
        return {"weight": w.reshape(shape), "on_input": torch.tensor(int(True in inputs))}

    def args(self, group: AdapterGroup) -> dict[str, str]:
        return {"train_on_input": "True"} if any(isinstance(a, InputAdapter) for a in group.adapters.values()) else {}

"""Parts of a block of a diffusion transformer: modulation, and attention with a processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.injection.attention_sites import AttentionSite
from veneer.injection.sites import Port, Site

from .._describe import TowerPart, geometry
from .._diffusers import NAMES, AttentionNames, adaptive_norm, attention, attention_shape
from .._records.block_parts import Branch, FeedForward, Stream, owner_of, read_port

__all__ = ["Attention", "Branch", "FeedForward", "FusedAttention", "Modules", "Stream"]


@dataclass(frozen=True)
class Modules:
    """Norms, and layers of the modulation (`adaln`) or of the role `role`. `Modules("norm1", "norm1_context")`.

    Args:
        paths: modules, or a parameter of the block, whose role is `table`.
        role: role of the layers.
    """

    paths: tuple[str, ...]
    role: str = "adaln"
    table: str = "adaln.table"

    def __init__(self, *paths: str, role: str = "adaln", table: str = "adaln.table") -> None:
        for name, value in {"paths": paths, "role": role, "table": table}.items():
            object.__setattr__(self, name, value)

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        for name in self.paths:
            path = f"{block}.{name}"
            if part.has(*owner_of(path)):
                yield part.parameter(*owner_of(path), self.table)
            elif self.role == "adaln":
                yield from adaptive_norm(part, path)
            else:
                for leaf, _ in part.modules_with_parameters(path):
                    yield from part.layer(leaf, self.role)


@dataclass(frozen=True)
class Attention:
    """An attention, and the branches of its streams.

    Args:
        path: of the module. `norm`, `context_norm`: norms before it, where the branches of the two streams are read; without
            one, at the module's own input.
        names: of its modules. `rotary`: option of the model's config that is true if keys are rotated, for `names`.
        branch: False if the block adds the output together with another one.
    """

    path: str = "attn"
    norm: str = ""
    context_norm: str = ""
    names: AttentionNames = NAMES
    rotary: str = ""
    branch: bool = True

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        path = f"{block}.{self.path}"
        attn = part.module(path)
        if attn is None:
            return
        model: Any = part.model
        names = replace(self.names, rotary=bool(model.config[self.rotary])) if self.rotary else self.names
        yield from attention(part, path, order[path], names)
        if self.branch:
            width, role = attention_shape(attn, self.names)["width"], "xattn" if self.names.is_cross(attn) else "attn"
            yield part.branch(path, role, read_port(part, block, self.norm, path), Port(path, "out"), width)
            out = f"{path}.{self.names.added_out}"
            if self.context_norm and part.module(out) is not None:
                read = Port(f"{block}.{self.context_norm}", "in")
                width = geometry(part.module(out))["d_out"]
                yield part.branch(f"{path}.context", f"{role}.context", read, Port(out, "out"), width)


@dataclass(frozen=True)
class FusedAttention:
    """An attention whose projections are one layer, with other layers of the block.

    Args:
        path: of the module. `fused`: its layer, of the role `whole`.
        rows: for the module, the name of each slice to its role and number of rows.
        layers: further layers and norms of the module, with their roles.
    """

    path: str
    fused: str
    rows: Callable[[Any], dict[str, tuple[str, int]]]
    whole: str = "attn.qkv"
    layers: Mapping[str, str] = field(default_factory=dict)

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        path = f"{block}.{self.path}"
        attn = part.module(path)
        slices = {f"{path}.{name}": value for name, value in self.rows(attn).items()}
        yield from part.slices(f"{path}.{self.fused}", self.whole, slices)
        for name, role in self.layers.items():
            yield from part.norm(f"{path}.{name}", role) if role.startswith("norm") else part.layer(f"{path}.{name}", role)
        width = geometry(part.module(f"{path}.{self.fused}"))["d_in"]
        yield AttentionSite(
            name=f"{path}.processor", role="attn.processor", path=path, width=width, context_width=width, heads=attn.heads,
            cross=False, index=order[path], plain=False, **part.labels,
        )  # fmt: skip

"""Parts of a transformer block, in the order of its forward pass. Each yields the sites of the modules that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from veneer.injection.sites import BranchSite, Layout, Port, Site

from .._describe import LAYERS, TowerPart, geometry, is_norm, own_parameters
from .._diffusers import attention_shape


class Part(Protocol):
    """A part of a block."""

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        """Sites of the block at the path `block`; modules that it lacks have none.

        Args:
            order: index of each attention module with a processor by path.
        """


@dataclass(frozen=True)
class Blocks:
    """A list of blocks.

    Args:
        path: of the list.
        parts: of each block, in the order of the forward pass; a block lacks those whose module it does not have.
        stage: label of the sites, if the model has blocks in several lists.
        last_inert: beginnings of the names of sites in the last block whose effect the model drops, such as its text stream.
    """

    path: str
    parts: tuple[Part, ...]
    stage: str | None = None
    last_inert: tuple[str, ...] = ()

    def sites(self, part: TowerPart, index: int, last: bool, order: Mapping[str, int]) -> Iterator[Site]:
        """Every site of one block."""
        block = f"{self.path}.{index}"
        unused = tuple(f"{block}.{name}" for name in self.last_inert) if last else ()
        for site in (site for piece in self.parts for site in piece.sites(part, block, order)):
            if not site.name.startswith(unused):
                yield site
            elif not isinstance(site, BranchSite):
                yield replace(site, inert=True)

    def count(self, part: TowerPart) -> int:
        """Number of blocks; 0 if the model has no such list."""
        module = part.module(self.path)
        return len(module) if isinstance(module, nn.ModuleList) else 0


@dataclass(frozen=True)
class Single:
    """A module outside of the lists that has parts, such as attention pooling; empty if the model lacks it.

    Args:
        path, parts, stage: as for `Blocks`.
    """

    path: str
    parts: tuple[Part, ...]
    stage: str | None = None

    def sites(self, part: TowerPart, order: Mapping[str, int]) -> Iterator[Site]:
        """Every site of the module."""
        if isinstance(part.module(self.path), nn.Module):
            for piece in self.parts:
                yield from piece.sites(part, self.path, order)


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward: layers in the order of the forward pass, and its branch.

    Args:
        path: of the module. `norm`: norm before it, where the branch is read; without one, at the module's own input, as where
            two streams share the module.
        role: `mlp`, or `mlp.context` for that of a second stream.
        layers: name of each layer to the last component of its role, without those that the module lacks; the last one writes the
            branch.
        layout: of the branch.
        branch: False if the block adds the output together with another one.
        plain_norm: True if the norm has no modulation: its sites come first, and the branch has a `normed` port.
        scale: layer scale of the block after it: a module, which writes the branch, or a parameter.
    """

    path: str = "ff"
    norm: str = ""
    role: str = "mlp"
    layers: Mapping[str, str] = field(default_factory=lambda: {"net.0.proj": "in", "net.2": "out"})
    layout: Layout = "NLC"
    branch: bool = True
    plain_norm: bool = False
    scale: str = ""

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        path = f"{block}.{self.path}"
        present = [name for name in self.layers if isinstance(part.module(f"{path}.{name}"), LAYERS)]
        if not present:
            return
        if self.plain_norm:
            yield from part.norm(f"{block}.{self.norm}")
        for name in present:
            yield from part.layer(f"{path}.{name}", f"{self.role}.{self.layers[name]}")
        yield from layer_scale(part, block, self.scale)
        if self.branch:
            read, write = read_port(part, block, self.norm, path), write_port(part, block, self.scale, path)
            normed = Port(read.path, "out") if self.plain_norm else None
            width = geometry(part.module(f"{path}.{present[-1]}"))["d_out"]
            yield part.branch(path, self.role, read, write, width, normed=normed, layout=self.layout)


@dataclass(frozen=True)
class Branch:
    """A branch between two modules of the block, such as attention and feed-forward with one output layer."""

    role: str
    read: str
    write: str

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        width = geometry(part.module(f"{block}.{self.write}"))["d_out"]
        yield part.branch(block, self.role, Port(f"{block}.{self.read}", "in"), Port(f"{block}.{self.write}", "out"), width)


@dataclass(frozen=True)
class Stream:
    """The residual stream through the block.

    Args:
        path: a module of its width: a norm, an attention or a layer. `can_drop`: any part of its tokens may enter the block.
    """

    path: str
    can_drop: bool = False

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        yield part.stream(block, width_of(part.module(f"{block}.{self.path}")), can_drop=self.can_drop)


def width_of(module: Any) -> int:
    """Width of the input of a norm, a layer or an attention."""
    if is_norm(module):
        return int(module.weight.numel())
    return int(geometry(module)["d_in"]) if isinstance(module, LAYERS) else attention_shape(module)["width"]


def read_port(part: TowerPart, block: str, norm: str, path: str) -> Port:
    """The input of the norm, or of the module at `path` if there is no norm."""
    has_norm = bool(norm) and isinstance(part.module(f"{block}.{norm}"), nn.Module)
    return Port(f"{block}.{norm}" if has_norm else path, "in")


def write_port(part: TowerPart, block: str, scale: str, path: str) -> Port:
    """The output of the layer scale, or of the module at `path` if the scale is no module."""
    has_scale = bool(scale) and isinstance(part.module(f"{block}.{scale}"), nn.Module)
    return Port(f"{block}.{scale}" if has_scale else path, "out")


def layer_scale(part: TowerPart, block: str, scale: str) -> Iterator[Site]:
    """The parameters of a layer scale: those of a module of the block, or one parameter of the block."""
    if scale and part.has(block, scale):
        yield part.parameter(block, scale, "scale")
    elif scale and isinstance(module := part.module(f"{block}.{scale}"), nn.Module):
        for param in own_parameters(module):
            yield part.parameter(f"{block}.{scale}", param, "scale")


def owner_of(path: str) -> tuple[str, str]:
    """Path of a module, and name of a parameter in it."""
    owner, _, param = path.rpartition(".")
    return owner, param

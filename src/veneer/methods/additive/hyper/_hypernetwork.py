"""The hypernetwork of HyperFormer, and the adapters that it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from veneer.functional.channels import channels_product
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite, Site

Activation = Literal["gelu_tanh", "gelu", "swish", "relu"]
STD = 0.01
"""Standard deviation of the initial matrices of the hypernetwork."""
NORM_EPS = 1e-6
"""ε of the norm of the projected embedding."""


class Generated(NamedTuple):
    """Parameters of one adapter: `down` (h, width), `up` (width, h), and the scale and shift of its norm (width,)."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    norm: Tensor
    norm_bias: Tensor


def shapes_of(width: int, bottleneck: int) -> Generated:
    """Shapes of the parameters of one adapter."""
    shapes: Any = ((bottleneck, width), (bottleneck,), (width, bottleneck), (width,), (width,), (width,))
    return Generated(*shapes)


class Affine(nn.Module):
    """W v + b in a shape. `weight` from a normal distribution with 0.01, `bias` zero."""

    def __init__(self, d_in: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        size = torch.Size(self.shape).numel()
        self.weight = nn.Parameter(torch.empty(size, d_in))
        self.bias = nn.Parameter(zeros(size))
        nn.init.normal_(self.weight, std=STD)

    def forward(self, v: Tensor) -> Tensor:
        """v: (d_in,)."""
        return F.linear(v, self.weight, self.bias).view(self.shape)


class Generator(nn.Module):
    """Generates the parameters of an adapter from a projected embedding, each by a linear layer."""

    def __init__(self, d_in: int, width: int, bottleneck: int) -> None:
        super().__init__()
        for name, shape in shapes_of(width, bottleneck)._asdict().items():
            self.add_module(name, Affine(d_in, shape))

    def forward(self, v: Tensor) -> Generated:
        """v: (d_in,)."""
        return Generated(*(self.get_submodule(name)(v) for name in Generated._fields))


@dataclass(frozen=True)
class Layout:
    """Which embeddings and which generator the hypernetwork has for each site.

    Args:
        layer, position: key of a site's layer and position embedding; None for a hypernetwork without them.
        generator: key of a site's generator, without the width.
        norm: the projected embedding is normalized.
    """

    layer: Callable[[BranchSite], str] | None
    position: Callable[[BranchSite], str] | None
    generator: Callable[[BranchSite], str]
    norm: bool

    def generator_of(self, site: BranchSite) -> str:
        """Name of the module of a site's generator: sites of another width have another."""
        return f"{self.generator(site)}-{site.width}".replace(".", "_")


def layer_of(site: BranchSite) -> str:
    """Tower and block of a site, in an order that sorts."""
    return f"{site.tower}/{-1 if site.depth is None else site.depth:06d}"


class Hypernetwork(nn.Module):
    """v = LN(W₂ ReLU(W₁ [task; layer; position])), from which the generators compute the parameters of each adapter.

    Attributes:
        tasks: (tasks, e). `layers`, `positions`: (number, e), or None. `task`: buffer (), the index of the current task.
    """

    task: Tensor
    layers: nn.Parameter | None
    positions: nn.Parameter | None

    def __init__(self, method: HyperMethod, sites: Sequence[BranchSite]) -> None:
        super().__init__()
        self.layout = layout = method.layout()
        self.tasks = _embeddings(len(method.tasks), method.embedding)
        self._layer_index = _indices(sites, layout.layer)
        self._position_index = _indices(sites, layout.position)
        self.layers = _embeddings(len(self._layer_index), method.embedding) if layout.layer else None
        self.positions = _embeddings(len(self._position_index), method.embedding) if layout.position else None
        parts = 1 + bool(layout.layer) + bool(layout.position)
        self.hidden = Affine(parts * method.embedding, (method.hidden,))
        self.projection = Affine(method.hidden, (method.projected,))
        self.norm = nn.LayerNorm(method.projected, eps=NORM_EPS) if layout.norm else nn.Identity()
        self.generators = nn.ModuleDict()
        for site in sites:
            key = layout.generator_of(site)
            if key not in self.generators:
                self.generators[key] = Generator(method.projected, site.width, method.width_at(site))
        self.register_buffer("task", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, site: BranchSite) -> Generated:
        """The parameters of one site's adapter for the current task."""
        parts = [self.tasks.index_select(0, self.task.view(1))[0]]
        if self.layers is not None and self.layout.layer is not None:
            parts.append(self.layers[self._layer_index[self.layout.layer(site)]])
        if self.positions is not None and self.layout.position is not None:
            parts.append(self.positions[self._position_index[self.layout.position(site)]])
        projected = self.norm(self.projection(F.relu(self.hidden(torch.cat(parts)))))
        generated: Generated = self.generators[self.layout.generator_of(site)](projected)
        return generated


def _indices(sites: Sequence[BranchSite], key: Callable[[BranchSite], str] | None) -> dict[str, int]:
    return {} if key is None else {name: index for index, name in enumerate(sorted({key(site) for site in sites}))}


def _embeddings(count: int, width: int) -> nn.Parameter:
    """From the standard normal distribution."""
    return nn.Parameter(nn.init.normal_(torch.empty(count, width)))


class HyperAdapter(Adapter):
    """y' = y + LN(Up(act(Down(y)))), with parameters of the hypernetwork, or with its own ones after `materialize`."""

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[Literal["write"]] = "write"
    shared: Hypernetwork

    def __init__(self, site: BranchSite, act: Activation, bottleneck: int | None = None) -> None:
        super().__init__()
        self.site, self.act = site, act
        self.materialized = bottleneck is not None
        if bottleneck is not None:
            for name, shape in shapes_of(site.width, bottleneck)._asdict().items():
                value = nn.init.normal_(torch.empty(shape), std=STD) if len(shape) == 2 else zeros(*shape)
                self.register_parameter(name, nn.Parameter(value))
            nn.init.normal_(self.get_parameter("norm"), std=STD)

    def own(self) -> Generated:
        """The adapter's parameters for the current task."""
        if self.materialized:
            return Generated(*(self.get_parameter(name) for name in Generated._fields))
        return self.shared(self.site)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the branch, in the site's layout."""
        own, layout = self.own(), self.site.layout
        low = activate(channels_product(x, own.down, own.down_bias, layout), self.act)
        change = channels_product(low, own.up, own.up_bias, layout)
        scale, shift = own.norm * self.strength, own.norm_bias * self.strength
        if layout == "NCHW":
            return y + F.layer_norm(change.movedim(1, -1), scale.shape, scale, shift).movedim(-1, 1)
        return y + F.layer_norm(change, scale.shape, scale, shift)

    @torch.no_grad()
    def materialize(self) -> None:
        """Keeps the parameters of the current task as its own. The hypernetwork stays until `release`."""
        for name, value in self.own()._asdict().items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        self.materialized = True

    def release(self) -> None:
        """Drops the hypernetwork."""
        self._modules.pop("shared", None)


def activate(z: Tensor, act: Activation) -> Tensor:
    """The activation with the given name; `swish` is z ∘ sigmoid(z)."""
    if act == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if act == "swish":
        return F.silu(z)
    return F.relu(z) if act == "relu" else F.gelu(z)


@dataclass(frozen=True)
class HyperMethod(Method):
    """Base of the HyperFormer methods; their options."""

    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp")
    identity_at_start: ClassVar[bool] = False
    needs_tasks: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-4
    shared_options: ClassVar[tuple[str, ...]] = (
        "tasks", "reduction", "embedding", "hidden", "projected", "act", "materialized",
    )  # fmt: skip

    tasks: tuple[str, ...] = ()
    reduction: int = 32
    embedding: int = 512
    hidden: int = 128
    projected: int = 64
    act: Activation = "gelu_tanh"
    materialized: bool = False

    def __post_init__(self) -> None:
        for name in ("reduction", "embedding", "hidden", "projected"):
            if getattr(self, name) < 1:
                raise OptionError.of(self.name, name, getattr(self, name), "at least 1")
        if self.act not in get_args(Activation):
            raise OptionError.of(self.name, "act", self.act, f"one of {', '.join(get_args(Activation))}")
        if len(set(self.tasks)) != len(self.tasks) or "" in self.tasks:
            raise OptionError.of(self.name, "tasks", self.tasks, "different names")
        if self.materialized and len(self.tasks) != 1:
            raise OptionError.of(self.name, "tasks", self.tasks, "the one task of materialized adapters")

    def layout(self) -> Layout:
        """The embeddings and generators."""
        raise NotImplementedError

    def width_at(self, site: BranchSite) -> int:
        """h at a site."""
        return max(1, site.width // self.reduction)

    def build_shared(self, sites: Sequence[BranchSite]) -> Hypernetwork | None:
        """The hypernetwork of a tower.

        Raises:
            OptionError: there are no tasks.
        """
        if not self.tasks:
            expected = "the names of one task or more, which `veneer transfer DATA1 DATA2 … --tasks` sets"
            raise OptionError.of(self.name, "tasks", (), expected)
        return None if self.materialized else Hypernetwork(self, sites)

    def build(self, site: BranchSite) -> HyperAdapter:
        """The adapter of one branch; its parameters are in the hypernetwork unless they are materialized."""
        return HyperAdapter(site, self.act, self.width_at(site) if self.materialized else None)

    def count(self, site: BranchSite) -> int:
        """0; of materialized adapters 2·width·h + h + 3·width."""
        return (2 * site.width + 1) * self.width_at(site) + 3 * site.width if self.materialized else 0

    def select_task(self, adapters: Iterable[tuple[Site, Any]], index: int) -> None:
        """Writes the index of the task into each hypernetwork."""
        shared = {id(adapter.shared): adapter.shared for _, adapter in adapters if not adapter.materialized}
        for hypernetwork in shared.values():
            hypernetwork.task.fill_(index)

    def materialize(self, adapters: Iterable[tuple[Site, Any]], index: int) -> Self:
        """Generates the parameters of one task, and drops the hypernetworks."""
        parts = list(adapters)
        self.select_task(parts, index)
        for _, adapter in parts:
            adapter.materialize()
        for _, adapter in parts:
            adapter.release()
        return replace(self, tasks=(self.tasks[index],), materialized=True)

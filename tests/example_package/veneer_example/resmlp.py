"""A small model of this package's own, and the host that describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection import Host
from veneer.injection.sites import BranchSite, FeatureSite, ParamSite, Port, Site, WeightSite


class Block(nn.Module):
    """x + down(gelu(up(norm(x))))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ResMLP(nn.Module):
    """Features (batch, inputs) to logits (batch, classes), through `depth` residual blocks."""

    def __init__(self, inputs: int = 5, width: int = 8, hidden: int = 12, depth: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        x = self.stem(features)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ResMLPHost(Host):
    """Every weight, bias and norm of a `ResMLP`, its branches, and the features before its head."""

    name: ClassVar[str] = "resmlp"
    tower: ClassVar[str] = "features"
    library: ClassVar[str] = "veneer_example"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, ResMLP)

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        net: Any = model
        yield from _layer("stem", net.stem, "proj.in")
        for depth, block in enumerate(net.blocks):
            path = f"blocks.{depth}"
            for param, role in {"weight": "norm", "bias": "bias.norm"}.items():
                yield _param(f"{path}.norm", param, role, block.norm.bias.shape, depth)
            yield from _layer(f"{path}.up", block.up, "mlp.in", depth)
            yield from _layer(f"{path}.down", block.down, "mlp.out", depth)
            read, write = Port(f"{path}.norm", "in"), Port(f"{path}.down", "out")
            width = block.down.out_features
            yield BranchSite(name=f"{path}.mlp", role="mlp", depth=depth, read=read, write=write, width=width)
        port, width = Port("head", "in"), net.head.in_features
        yield FeatureSite(name="head.features", role="features", port=port, width=width, head="head")
        yield from _layer("head", net.head, "head")

    def sample(self, model: nn.Module) -> dict[str, Any]:
        net: Any = model
        rows = torch.randn(2, net.stem.in_features, generator=torch.Generator().manual_seed(0))
        return {"features": rows.to(net.stem.bias)}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {"resmlp": ResMLP, "deep": lambda: ResMLP(depth=4)}


def _layer(path: str, layer: nn.Linear, role: str, depth: int | None = None) -> Iterator[Site]:
    d_out, d_in = layer.weight.shape
    yield WeightSite(name=path, role=role, depth=depth, path=path, d_out=d_out, d_in=d_in)
    yield _param(path, "bias", f"bias.{role}", layer.bias.shape, depth)


def _param(path: str, param: str, role: str, shape: Any, depth: int | None) -> ParamSite:
    called = param == "bias"
    return ParamSite(
        name=f"{path}.{param}",
        role=role,
        depth=depth,
        tower="features",
        path=path,
        param=param,
        shape=tuple(shape),
        called=called,
    )

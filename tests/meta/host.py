"""A host of three linear layers, on which every check of the suite takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from veneer.injection.host import Host
from veneer.injection.sites import BranchSite, ParamSite, Port, Site, WeightSite


class Layers(nn.Module):
    """x + out(gelu(into(x))), then a layer whose weight is read and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 6)
        self.read = nn.Linear(6, 6, bias=False)
        self.checkpointing = False

    def set_grad_checkpointing(self, on: bool = True) -> None:
        self.checkpointing = on

    def branch(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.into(x)))

    def forward(self, x: Tensor) -> Tensor:
        more = checkpoint(self.branch, x, use_reentrant=False) if self.checkpointing and self.training else self.branch(x)
        x = x + more
        return x + F.linear(x, self.read.weight)


class LayersHost(Host):
    """Sites of `Layers`, written down one by one."""

    name: ClassVar[str] = "layers"
    tower: ClassVar[str] = "layers"
    library: ClassVar[str] = "torch"

    def matches(self, model: nn.Module) -> bool:
        return type(model) is Layers

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        yield WeightSite(name="into", role="mlp.in", path="into", d_out=8, d_in=6, depth=0)
        yield WeightSite(name="out", role="mlp.out", path="out", d_out=6, d_in=8, depth=0)
        for name, width in {"into": 8, "out": 6}.items():
            role = "bias.mlp.in" if name == "into" else "bias.mlp.out"
            yield ParamSite(name=f"{name}.bias", role=role, path=name, param="bias", shape=(width,), called=True, depth=0)
        yield BranchSite(name="mlp.branch", role="mlp", read=Port("into", "in"), write=Port("out", "out"), width=6, depth=0)
        yield WeightSite(name="read", role="proj.out", path="read", d_out=6, d_in=6, called=False)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        weight: Any = model.get_parameter("into.weight")
        return {"x": torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(weight)}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {"layers": Layers}

"""A small model with every kind of layer that seams treat differently, and its host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.host import Host
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite, NormSite, ParamSite, Port, Site, WeightSite


class Net(nn.Module):
    """Embedding, grouped and strided convolution, BatchNorm, fused `qkv`, a weight that is read, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.qkv = nn.Linear(6, 18)
        self.read = nn.Linear(6, 6)
        self.spare = nn.Linear(6, 6)
        self.tail = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.head = nn.Linear(6, 3)
        self.fused = False

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        # Contiguous, because a product with strided operands is computed in another order where the weight needs gradients.
        x = self.norm(self.conv(image)).flatten(2).mT.contiguous() + self.table(ids)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + torch.softmax(q @ k.mT, dim=-1) @ v
        x = x + F.linear(x, self.read.weight, self.read.bias)
        return self.head(x + self.tail(x))


def _weight(path: str, role: str, module: nn.Module, **fields: Any) -> WeightSite:
    if isinstance(module, nn.Embedding):
        shape = {"kind": "embedding", "d_out": 6, "d_in": 7}
    elif isinstance(module, nn.Conv2d):
        shape = {"kind": "conv", "d_out": 6, "d_in": 2, "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
        shape |= {"dilation": (1, 1), "groups": 2}
    else:
        shape = {"d_out": module.out_features, "d_in": module.in_features}
    if not isinstance(module, nn.Embedding):
        shape["bias"] = f"{path}.bias"
    return WeightSite(**{"name": path, "role": role, "path": path, **shape, **fields})


class ToyHost(Host):
    """Describes the sites of `Net`."""

    name: ClassVar[str] = "toy"
    tower: ClassVar[str] = "toy"
    library: ClassVar[str] = "torch"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Net)

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        net: Any = model
        yield _weight("table", "embed.token", net.table)
        yield _weight("conv", "conv", net.conv, depth=0)
        yield ParamSite(
            name="conv.bias", role="bias.conv", path="conv", param="bias", shape=(6,), called=True, channel_dim=1, depth=0
        )
        yield NormSite(name="norm", role="norm", path="norm", bias="norm.bias", width=6, channel_dim=1, depth=0)
        yield ParamSite(name="norm.weight", role="norm", path="norm", param="weight", shape=(6,), depth=0)
        yield _weight("qkv", "attn.qkv", net.qkv, fused=True, depth=1, guard="fused")
        for i, part in enumerate("qkv"):
            rows = (6 * i, 6 * i + 6)
            yield _weight(
                "qkv", f"attn.{part}", net.qkv, depth=1, name=f"qkv.{part}", rows=rows, bias_rows=rows, d_out=6, guard="fused"
            )
        yield _weight("read", "attn.out", net.read, called=False, depth=1)
        yield ParamSite(name="read.bias", role="bias.attn.out", path="read", param="bias", shape=(6,), depth=1)
        yield _weight("spare", "mlp.in", net.spare, depth=2)
        yield BranchSite(name="tail.branch", role="mlp", read=Port("tail.0", "in"), write=Port("tail", "out"), width=6, depth=2)
        yield BranchSite(
            name="inner.branch", role="inner", read=Port("tail.0", "in"), write=Port("tail.1", "out"), width=6, depth=2
        )
        yield _weight("head", "head", net.head)
        yield ParamSite(name="head.bias", role="bias.head", path="head", param="bias", shape=(3,), called=True)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        first = next(model.parameters())
        generator = torch.Generator().manual_seed(5)
        image = torch.randn(2, 2, 4, 4, generator=generator).to(first.device, first.dtype)
        return {"ids": torch.arange(8).reshape(2, 4).to(first.device) % 7, "image": image}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {"toy": Net}


class AddAdapter(Adapter):
    """y + a linear layer of x, for branches."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, width: int, fails: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.fails = fails
        nn.init.zeros_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.strength * self.inner(x)

    def enter(self, tower: nn.Module) -> None:
        if self.fails:
            raise RuntimeError("enter fails")


@dataclass(frozen=True)
class Add(Method):
    """A branch adapter, which raises an error on attach at the site `fails_at`."""

    name: ClassVar[str] = "add"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite), Need(WeightSite, where={"called": True}))
    default: ClassVar[tuple[str, ...]] = ("inner",)

    fails_at: str = ""

    def build(self, site: Any) -> Adapter:
        return AddAdapter(6, site.name == self.fails_at)


def net() -> Net:
    """A seeded model in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
        for tensor in model.norm.buffers():
            tensor.add_(1 if tensor.is_floating_point() else 3)
    return model


def run(model: nn.Module) -> Tensor:
    """The model's output on its host's sample."""
    with torch.no_grad():
        return model(**ToyHost().sample(model))


def stir(attachment: Any, size: float = 0.3) -> None:
    """Adds noise to all trainable parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in attachment.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=size)

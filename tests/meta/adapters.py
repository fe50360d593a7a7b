"""A good adapter, and bad ones: each violates one rule, and the corresponding check must fail."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite


class Dense(Adapter):
    """y' = y + D x, W' = W + D, with D = 0 at the start."""

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.path = site.path
        self.delta = nn.Parameter(torch.zeros(site.weight_shape))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.delta)

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta


@dataclass(frozen=True)
class Good(Method):
    """A full-rank change of every linear weight."""

    name: ClassVar[str] = "good"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": "linear"}),)
    default: ClassVar[tuple[str, ...]] = ("mlp",)
    adapter: ClassVar[type[Dense]] = Dense

    size: float = 1.0

    def build(self, site: WeightSite) -> Adapter:
        return self.adapter(site)

    def count(self, site: WeightSite) -> int:
        return site.d_out * site.d_in


BAD: dict[str, tuple[type[Good], str]] = {}
"""What is wrong, to the method and the name of the check that must catch it."""


def bad(what: str, check: str, **fields: Any) -> Any:
    """Decorator for a broken adapter or method."""

    def add(cls: type) -> type:
        made = cls if issubclass(cls, Method) else type(cls.__name__, (Good,), {"adapter": cls, **fields})
        made.name = "bad"  # type: ignore[attr-defined]
        BAD[what] = (made, check)
        return cls

    return add


@bad("it wraps but is never called", "every_site_live")
class NeverCalled(Dense):
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def weight(self, weight: Tensor) -> Tensor:
        return weight


@bad("it is not identity at start", "identity_at_start")
class NotIdentity(Dense):
    def __init__(self, site: WeightSite) -> None:
        super().__init__(site)
        nn.init.normal_(self.delta)


@bad("it is identity, though it says not", "identity_at_start", identity_at_start=False)
class SecretIdentity(Dense): ...


@bad("it trains the host", "only_the_adapter_trains")
class TrainsHost(Dense):
    def enter(self, tower: nn.Module) -> None:
        self.base = tower.get_submodule(self.path).get_parameter("weight")
        self.base.requires_grad_(True)


class TrainsHostSilently(Dense):
    """Writes to the host's weight during training, without a gradient."""

    def enter(self, tower: nn.Module) -> None:
        self.__dict__["host"] = tower.get_submodule("out").get_parameter("bias")

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.__dict__["host"].data.add_(1e-3)
        return super().output(x, y)


bad("it writes to the host while training", "host_untouched_after_steps")(TrainsHostSilently)


@bad("training does not move it", "host_untouched_after_steps")
class Frozen(Dense):
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return super().output(x, y) if not self.training else y + F.linear(x, self.delta.detach() + 0 * self.delta)


@bad("it leaves a hook behind", "detach_restores")
class LeavesHook(Dense):
    def enter(self, tower: nn.Module) -> None:
        tower.get_submodule("out").register_forward_hook(_ignore)


def _ignore(module: nn.Module, args: Any, output: Any) -> None: ...


@bad("it cleans up only if it ran", "attach_is_atomic")
class CleansUpLate(Dense):
    def enter(self, tower: nn.Module) -> None:
        self.__dict__.update(ran=False, hook=tower.get_submodule("out").register_forward_hook(_ignore))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        self.__dict__["ran"] = True
        return super().output(x, y)

    def leave(self) -> None:
        if self.__dict__.get("ran", True) and "hook" in self.__dict__:
            self.__dict__["hook"].remove()


@bad("its copies and neighbours share state by the name of the site", "two_adapters_compose")
class SharesBySite(Dense):
    latest: ClassVar[dict[str, Any]] = {}

    def enter(self, tower: nn.Module) -> None:
        self.latest[self.path] = self.delta

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.latest[self.path].to(x))


@bad("it cannot be switched off: it acts through a hook of its own", "disabled_equals_host")
class ActsByItself(Dense):
    def enter(self, tower: nn.Module) -> None:
        self.__dict__["hook"] = tower.get_submodule(self.path).register_forward_hook(self.act)

    def act(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + F.linear(args[0], self.delta)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def leave(self) -> None:
        if "hook" in self.__dict__:
            self.__dict__["hook"].remove()


@bad("it ignores its strength", "scale_zero_equals_host")
class IgnoresStrength(Dense):
    applies_strength: ClassVar[bool] = True


bad("it ignores its strength, and a graph that holds it cannot be switched off", "compiles_to_one_graph")(IgnoresStrength)


@bad("it is on or off, but not in between", "scale_zero_equals_host")
class OnOrOff(Dense):
    applies_strength: ClassVar[bool] = True

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.delta) * (self.strength != 0)

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta * (self.strength != 0)


@bad("its merge is off by a factor two", "weight_form_equals_output_form")
class MergeTwice(Dense):
    def weight(self, weight: Tensor) -> Tensor:
        return weight + 2 * self.delta


bad("its merge is off by a factor two, seen in the outputs", "merge_equals_explicit_change")(MergeTwice)


@bad("its merge squares the scale", "merge_equals_explicit_change")
class MergeSquared(Dense):
    applies_strength: ClassVar[bool] = True

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.delta) * self.strength**2

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta * self.strength**2


@bad("a merge leaves it changed", "unmerge_is_bitwise")
class ChangedByMerge(Dense):
    factor = 1.0

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.delta) * self.factor

    def weight(self, weight: Tensor) -> Tensor:
        self.factor = 2.0
        return super().weight(weight)


@bad("its config loses an option", "config_round_trip")
@dataclass(frozen=True)
class Forgets(Good):
    other: float = 1.5

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        return cls(other=2.0), cls(other=3.0)

    def config(self) -> dict[str, Any]:
        return {"size": self.size}


@bad("it takes any option", "config_round_trip")
@dataclass(frozen=True)
class TakesAll(Good):
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Method:
        return cls(size=config["size"])


@bad("its formula is off by one", "count_equals_built")
@dataclass(frozen=True)
class Miscounts(Good):
    def count(self, site: WeightSite) -> int:
        return super().count(site) + 1


@bad("it draws from another source of chance", "seeded_build_is_reproducible", identity_at_start=False)
class DrawsElsewhere(Dense):
    def __init__(self, site: WeightSite) -> None:
        super().__init__(site)
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
        nn.init.normal_(self.delta, generator=generator)


@bad("it depends on what is not saved", "save_load_save_is_byte_equal")
class Unsaved(Dense):
    def __init__(self, site: WeightSite) -> None:
        super().__init__(site)
        self.register_buffer("secret", torch.rand(()), persistent=False)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.delta) * self.get_buffer("secret")

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta * self.get_buffer("secret")


@bad("it saves a copy of what it trains", "everything_trained_is_saved")
class SavesCopy(Dense):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {key: tensor.clone() for key, tensor in super().state_dict(*args, **kwargs).items()}


@bad("its copies share a closure", "deepcopy_is_independent")
class Closure(Dense):
    def __init__(self, site: WeightSite) -> None:
        super().__init__(site)
        self.change = lambda x: F.linear(x, self.delta)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(x)


@bad("it leaks state between batch rows", "batch_rows_are_independent")
class MixesRows(Dense):
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x.mean(0, keepdim=True), self.delta)


@bad("it leaks state between calls", "calls_are_independent")
class KeepsLast(Dense):
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        last, self.__dict__["last"] = self.__dict__.get("last", x), x
        return y + F.linear(last, self.delta)


@bad("it takes over the host's half precision", "half_precision")
class TakesOverDtype(Dense):
    def enter(self, tower: nn.Module) -> None:
        self.to(tower.get_parameter("into.weight").dtype)


@bad("it fails under autocast", "autocast")
class NoAutocast(Dense):
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return y + F.linear(y.mT @ x, self.delta).sum() * 0 + F.linear(x, self.delta)


@bad("a forward pass that is run again differs", "checkpointing_gives_the_same_gradients")
class CountsPasses(Dense):
    passes = 0

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        self.passes += self.training
        return y + F.linear(x, self.delta) * (1 + self.passes)


@bad("it breaks the graph", "compiles_to_one_graph")
class BreaksGraph(Dense):
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.delta) if x.sum().item() < 1e9 else y


@bad("it compiles the scale in", "compiles_to_one_graph")
class CompilesScale(Dense):
    applies_strength: ClassVar[bool] = True

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.delta) * self.factor

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta * self.factor

    @property
    def factor(self) -> float:
        return 1.0 if torch.compiler.is_compiling() else float(self.strength)


@bad("it makes a tensor on the CPU", "runs_on_an_accelerator")
class OnTheCPU(Dense):
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return super().output(x, y) + torch.zeros(y.shape[-1])


@bad("it reads a value in its forward pass", "adapters_cause_no_synchronization")
class ReadsAValue(Dense):
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.delta) if self.delta.abs().max().item() < 1e6 else y

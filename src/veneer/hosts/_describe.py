"""Builds sites from modules, with the geometry and labels that every host needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection.attention_sites import SelfAttentionSite
from veneer.injection.seams.seam import Seam
from veneer.injection.sites import BranchSite, FeatureSite, NormSite, ParamSite, Port, Site, StreamSite, WeightSite

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVS)
SAME_PADDED = ("Conv2dSame", "Conv2dSameExport")  # timm's convolutions with TensorFlow's padding, also when strided
OFFSET_NORMS = ("Krea2RMSNorm",)  # norm(x) ∘ (1 + weight): their weight is a parameter, but no scale
HEAD_OUTPUTS = ("attn.out", "xattn.out")  # roles of layers whose input is the concatenation of the attention heads
HEADS = ("num_heads", "heads", "num_attention_heads", "n_heads")  # attributes of attention modules
CHANNELS_FIRST = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class TowerPart:
    """A part of a tower: builds sites from its modules, all with the same labels.

    Args:
        model: the tower's root module.
        tower, component, depth, stage: labels of the sites.
        guard: attribute path on which the validity of the sites depends.
    """

    model: nn.Module
    tower: str
    component: str = ""
    depth: int | None = None
    stage: str | None = None
    guard: str | None = field(default=None, kw_only=True)

    def at(self, **labels: Any) -> TowerPart:
        """A copy with other labels."""
        return replace(self, **labels)

    @cached_property
    def labels(self) -> dict[str, Any]:
        """The labels as keyword arguments of a site."""
        return {"tower": self.tower, "component": self.component, "depth": self.depth, "stage": self.stage}

    def module(self, path: str) -> Any:
        """The module at `path`, or None."""
        module: Any = self.model
        for name in path.split(".") if path else []:
            try:
                module = module._modules[name]  # ten times faster than getattr
            except (AttributeError, KeyError):
                module = getattr(module, name, None)
        return module

    def layer(
        self, path: str, role: str, *, called: bool = True, inert: bool = False, inert_bias: bool = False
    ) -> Iterator[Site]:
        """The weight and the bias of the linear layer, convolution or embedding at `path`; empty if there is no such layer."""
        module = self.module(path)
        if not isinstance(module, LAYERS):
            return
        bias = getattr(module, "bias", None)
        yield WeightSite(
            name=path, role=role, path=path, called=called, inert=inert, guard=self.guard,
            bias=f"{path}.bias" if bias is not None else "", **geometry(module), **self.labels,
            **(attention_fields(self.model, path) if role in HEAD_OUTPUTS else {}),
        )  # fmt: skip
        if bias is not None:
            yield self.bias(path, role, tuple(bias.shape), called=called, inert=inert or inert_bias)

    def slices(
        self,
        path: str,
        whole: str,
        names: dict[str, tuple[str, int]],
        *,
        called: bool = True,
        inert: tuple[str, ...] = (),
        inert_bias: tuple[str, ...] = (),
        biases: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[Site]:
        """A fused linear layer: the whole weight with the role `whole`, and row slices of the weight and bias.

        Args:
            names: name of each slice to its role and number of rows, in order.
            inert: roles of slices without effect. `inert_bias`: roles of slices whose bias has no effect.
            biases: last component of a slice's name to the path of a separate bias parameter, of the slice's width.
        """
        module = self.module(path)
        shape = {**geometry(module), "bias": f"{path}.bias" if module.bias is not None else ""}
        yield WeightSite(name=path, role=whole, path=path, fused=True, called=called, guard=self.guard, **shape, **self.labels)
        start = 0
        for name, (role, size) in names.items():
            rows, start = (start, start + size), start + size
            slice_shape: dict[str, Any] = {**shape, "d_out": size, "bias_rows": rows if shape["bias"] else None}
            if biases:
                slice_shape["bias"] = biases.get(name.rpartition(".")[2], "")
            fields: dict[str, Any] = {"rows": rows, "called": called}
            labels: dict[str, Any] = {**self.labels, "guard": self.guard, "inert": role in inert}
            yield WeightSite(name=name, role=role, path=path, **fields, **slice_shape, **labels)
            if module.bias is not None:
                yield self.bias(path, role, (size,), name=name, inert=role in (*inert, *inert_bias), **fields)

    def bias(self, path: str, role: str, shape: tuple[int, ...], *, name: str = "", **fields: Any) -> ParamSite:
        """The bias (or rows of it) of the module at `path`."""
        module = self.module(path)
        fields = {"called": True, "channel_dim": channel_dim(module), "guard": self.guard, **fields}
        return ParamSite(
            name=f"{name or path}.bias", role=f"bias.{role}", path=path, param="bias", shape=shape, **fields, **self.labels
        )

    def norm(
        self, path: str, role: str = "norm", *, called: bool = True, inert: bool = False, inert_bias: bool = False
    ) -> Iterator[Site]:
        """The norm at `path`, its weight and its bias; empty without a norm. `called`: False if only its tensors are sites."""
        module = self.module(path)
        called = called and ends_with_norm(module)
        if isinstance(weight := getattr(module, "weight", None), Tensor) and type(module).__name__ not in OFFSET_NORMS:
            bias = f"{path}.bias" if isinstance(getattr(module, "bias", None), Tensor) else ""
            yield NormSite(
                name=path, role=role, path=path, bias=bias, width=len(weight), channel_dim=channel_dim(module),
                called=called, inert=inert, guard=self.guard, **self.labels,
            )  # fmt: skip
        for param in ("weight", "bias"):
            if isinstance(tensor := getattr(module, param, None), Tensor):
                if param == "bias":
                    yield self.bias(path, role, tuple(tensor.shape), called=called, inert=inert or inert_bias)
                else:
                    yield self.parameter(path, param, role, inert=inert)

    def parameter(self, path: str, param: str, role: str, *, inert: bool = False) -> ParamSite:
        """A single parameter of the module at `path`, which the module reads."""
        shape = tuple(getattr(self.module(path), param).shape)
        name = f"{path}.{param}" if path else param
        return ParamSite(name=name, role=role, path=path, param=param, shape=shape, inert=inert, **self.labels)

    def branch(self, name: str, role: str, read: Port, write: Port, width: int, **fields: Any) -> BranchSite:
        """A residual branch. `fields`: other fields of a `BranchSite`."""
        return BranchSite(name=f"{name}.branch", role=role, read=read, write=write, width=width, **fields, **self.labels)

    def self_attention(self, path: str, layers: Iterable[Site], *, can_extend: bool = False, **fields: Any) -> Iterator[Site]:
        """The sites `layers`, then the self-attention at `path` if they have its queries, keys, values and output layer.

        Args:
            can_extend: nothing fixes the number of tokens. `fields`: further fields of a `SelfAttentionSite`.
        """
        roles: dict[str, WeightSite] = {}
        for site in layers:
            yield site
            if isinstance(site, WeightSite):
                roles[site.role] = site
        out = roles.get("attn.out")
        if out and out.heads and all(f"attn.{x}" in roles for x in "qkv"):
            query, key, value = (roles[f"attn.{x}"] for x in "qkv")
            yield SelfAttentionSite(
                name=f"{path}.module", role="attn.module", path=path, width=query.d_in, heads=out.heads, query=query, key=key,
                value=value, out=out, can_extend=can_extend and out.sdpa, guard=self.guard, **fields, **self.labels,
            )  # fmt: skip

    def stream(self, path: str, width: int, *, role: str = "block", d_in: int = 0, **fields: Any) -> StreamSite:
        """The residual stream through the block at `path`. `d_in`: channels of the input. `fields`: others of a `StreamSite`."""
        fields["d_in"] = d_in if d_in != width else 0
        return StreamSite(name=f"{path}.stream", role=role, path=path, width=width, **fields, **self.labels)

    def features(self, head: str, width: int, tokens: Port | None = None) -> Iterator[FeatureSite]:
        """The pooled features, which enter the head at path `head`, and its logits. `tokens`: the features before pooling."""
        read, module = Port(head, "in"), self.module(head)
        classes: int = getattr(module, "out_features", 0) or getattr(module, "out_channels", 0)
        for role, port in (("features", read), ("logits", Port(head, "out"))):
            yield FeatureSite(
                name=f"{head}.{role}", role=role, port=port, read=read, tokens=tokens, width=width, classes=classes, head=head,
                **self.labels,
            )  # fmt: skip

    def modules_with_parameters(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        """Modules at and below `path` with direct parameters, in registration order."""
        root = self.module(path)
        for name, module in own_modules(root) if isinstance(root, nn.Module) else ():
            if own_parameters(module):
                yield ".".join(filter(None, (path, name))), module

    def has(self, path: str, param: str) -> bool:
        """True if there is a module at `path` that has a parameter of that name."""
        module = self.module(path)
        return isinstance(module, nn.Module) and param in own_parameters(module)


def own_parameters(module: nn.Module) -> list[str]:
    """Names of a module's direct parameters, including those that are parametrized while an adapter is attached."""
    order = module.__dict__.get("_veneer_order", module._parameters)
    return [name for name in order if module._parameters.get(name, order) is not None]


def own_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and its descendants without adapters, in registration order."""
    yield path, module
    for name, child in module.named_children():
        if not isinstance(child, Seam) and not (name == "parametrizations" and "_veneer_order" in module.__dict__):
            yield from own_modules(child, f"{path}.{name}" if path else name)


def geometry(module: nn.Module) -> dict[str, Any]:
    """Kind, widths and, for convolutions, geometry of a layer's weight, as keyword arguments of a `WeightSite`."""
    if isinstance(module, nn.Embedding):
        return {"kind": "embedding", "d_out": module.embedding_dim, "d_in": module.num_embeddings}
    if isinstance(module, CONVS):
        pads_dynamically = any(c.__name__ in SAME_PADDED for c in type(module).__mro__)
        padding = "same" if pads_dynamically else (0,) * len(module.kernel_size) if module.padding == "valid" else module.padding
        fields = {"stride": module.stride, "padding": padding, "dilation": module.dilation, "groups": module.groups}
        return {"kind": "conv", "d_out": module.out_channels, "d_in": module.in_channels, "kernel": module.kernel_size, **fields}
    linear: Any = module
    return {"kind": "linear", "d_out": linear.out_features, "d_in": linear.in_features}


def attention_fields(model: nn.Module, path: str) -> dict[str, Any]:
    """Heads and path of the attention with the output projection at `path`, for a `WeightSite`; else empty."""
    parent = path.rpartition(".")[0]
    while parent:
        owner = model.get_submodule(parent)
        for name, module in (("", owner), *owner.named_children()):
            heads = next((value for each in HEADS if isinstance(value := getattr(module, each, None), int)), None)
            if heads is not None:
                return {"heads": heads, "attention": f"{parent}.{name}" if name else parent, "sdpa": calls_sdpa(module)}
        if parent.rpartition(".")[2].isdigit() and not isinstance(owner, (nn.ModuleList, nn.Sequential)):
            break  # a whole block
        parent = parent.rpartition(".")[0]
    return {}


def calls_sdpa(attn: Any) -> bool:
    """True if an attention module calls `F.scaled_dot_product_attention` once, or does so if timm's `fused_attn` is set."""
    if isinstance(attn, nn.MultiheadAttention) or "fused_attn" in vars(attn):
        return not any(hasattr(attn, name) for name in ("lambda_q1", "temperature"))  # two softmaxes; attention of channels
    if hasattr(attn, "processor"):
        name = type(attn.processor).__name__
        return not any(kind in name for kind in ("Linear", "XFormers", "Flash", "Sliced", "Mochi"))  # Mochi: once per sample
    recorded = getattr(attn, "attention_implementation", None)  # of modules without a config, see `skeletons.recording`
    return getattr(getattr(attn, "config", None), "_attn_implementation", recorded) == "sdpa"


def channel_dim(module: nn.Module) -> int:
    """The channel dimension of a module's output."""
    return 1 if isinstance(module, (*CONVS, *CHANNELS_FIRST)) or "2d" in type(module).__name__ else -1


def ends_with_norm(module: Any) -> bool:
    """False if the module applies an activation or dropout after its norm."""
    return all(isinstance(getattr(module, name, None), (nn.Identity, type(None))) for name in ("act", "drop"))


def is_norm(module: nn.Module) -> bool:
    """True for every kind of norm, by class name."""
    return "norm" in type(module).__name__.lower()


class SampleInputs:
    """Reproducible inputs for a model, on its device and in its dtype. Does not use the global random state."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # neither quantized nor 8-bit parameters
        first = next((p for p in model.parameters() if p.dtype in dtypes), torch.empty(0))
        self.device, self.dtype = first.device, first.dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def ids(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers from `low` to `high - 1`."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The given values as a tensor."""
        return torch.tensor(values, device=self.device, dtype=dtype)

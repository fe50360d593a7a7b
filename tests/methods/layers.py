"""Shared by the tests of weight methods: sites of bare layers, and adapters away from their initialization."""

from typing import Any

import torch
from torch import nn

from veneer.injection.method import Adapter, Method
from veneer.injection.sites import WeightSite


def conv_site(module: Any, name: str = "c", role: str = "conv.res", path: str = "c") -> WeightSite:
    return WeightSite(
        name=name, role=role, path=path, kind="conv", d_out=module.out_channels, d_in=module.in_channels,
        kernel=module.kernel_size, stride=module.stride, padding=module.padding, dilation=module.dilation, groups=module.groups,
    )  # fmt: skip


def site_of(module: nn.Module) -> WeightSite:
    """The site of the only layer of an `nn.Sequential`."""
    if isinstance(module, nn.Linear):
        return WeightSite(name="l", role="l", path="0", d_out=module.out_features, d_in=module.in_features)
    return conv_site(module, role="conv", path="0")


def trained(method: Method, site: WeightSite) -> Adapter:
    """An adapter in float64 with every tensor far from its initialization."""
    torch.manual_seed(0)
    adapter = method.build(site).double().eval()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    return adapter

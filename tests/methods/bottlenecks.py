"""Sites in every layout, a ViT written out block by block, and bottlenecks position by position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment
from veneer.injection.method import Adapter, Method
from veneer.injection.registry import hosts
from veneer.injection.sites import BranchSite, Port, StreamSite

WIDTH, GRID, PREFIX = 5, (2, 3), 2
LAYOUTS = ("NLC", "NHWC", "NCHW")


def branch(layout: Any = "NLC", width: int = WIDTH, prefix: int = PREFIX, **fields: Any) -> BranchSite:
    given: dict[str, Any] = {
        "read": Port("norm", "in"), "normed": Port("norm", "out"), "write": Port("drop", "out"), "grid": GRID, **fields,
    }  # fmt: skip
    return BranchSite(
        name="mlp.branch", role="mlp", width=width, layout=layout, prefix_tokens=prefix if layout == "NLC" else 0, **given
    )


def stream(layout: Any = "NLC", width: int = WIDTH) -> StreamSite:
    return StreamSite(name="block.stream", role="block", path="block", width=width, layout=layout)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laid_out(pictures: Tensor, prefix: Tensor, layout: str) -> Tensor:
    """Images (B, H, W, C) in a layout; with prefix tokens (B, P, C) in front if it has some."""
    if layout == "NLC":
        return torch.cat([prefix, pictures.flatten(1, 2)], 1)
    return pictures if layout == "NHWC" else pictures.movedim(-1, 1).contiguous()


def trained(method: Method, site: Any) -> Any:
    """An adapter in float64 with every tensor far from its initialization."""
    torch.manual_seed(0)
    adapter = method.build(site).double().eval()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    return adapter


def everywhere(function: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """A function of one position's channels at every position of (…, C), one after the other."""
    return torch.stack([function(v) for v in features.reshape(-1, features.shape[-1])]).view(*features.shape[:-1], -1)


def change(adapter: Any, act: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Up(act(Down(v))) for one position, without any scale."""
    down, up = adapter.down_bias, adapter.up_bias
    low = act(adapter.down @ v + (0 if down is None else down))
    return adapter.up @ low + (0 if up is None else up)


def check_layouts(method: Method, site: Callable[[str], Any], slow: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """In every layout, `output` is `slow(adapter, x, y)` of the same features channels last: (B, P, C) and (B, H, W, C)."""
    tokens = [random(2, PREFIX, WIDTH, seed=s) for s in (1, 2)]
    pictures = [random(2, *GRID, WIDTH, seed=s) for s in (3, 4)]
    for layout in LAYOUTS:
        adapter = trained(method, site(layout))
        with torch.no_grad():
            got = adapter.output(*(laid_out(p, t, layout) for p, t in zip(pictures, tokens, strict=True)))
            expected = laid_out(slow(adapter, *pictures), slow(adapter, *tokens), layout)
            torch.testing.assert_close(got, expected, msg=lambda text, at=layout: f"{at}: {text}")


def tiny(key: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    model = hosts.get("timm_vit")().tiny()[key]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


def picture(size: int = 32) -> Tensor:
    return random(2, 3, size, size, seed=3)


def blocks_written_out(vit: Any, block: Callable[[int, Any, Tensor], Tensor], x: Tensor) -> Tensor:
    """A ViT whose blocks are `block(depth, module, stream)`."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for depth, module in enumerate(vit.blocks):
        x = block(depth, module, x)
    out: Tensor = vit.forward_head(vit.norm(x))
    return out


def stirred(tuned: Attachment) -> dict[str, Adapter]:
    """Adapters by site, with every tensor perturbed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return {name: adapter for name, (_, adapter) in tuned.parts.items()}

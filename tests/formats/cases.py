"""Shared by the tests of formats: adapters with nonzero values, and their weight updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.injection import Attachment


def fill(attachment: Attachment, seed: int = 1, std: float = 0.3) -> Attachment:
    """Set values as after training, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in attachment.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return attachment


def deltas(*attachments: Attachment) -> dict[str, Tensor]:
    """ΔW = s·B A of every site of LoRA attachments, written out with the rank that the tensors have."""
    found: dict[str, Tensor] = {}
    for attachment in attachments:
        method: Any = attachment.method
        for name, (site, adapter) in attachment.parts.items():
            down, up = adapter.down.detach().double(), adapter.up.detach().double()
            rank = down.shape[0]
            own = {**method.by_site.get(site.role, {}), **method.by_site.get(f"name:{name}", {})}
            alpha = own.get("alpha", rank if method.alpha is None else method.alpha)
            scale = alpha / (rank**0.5 if method.rslora else rank)
            found[name] = scale * (up.flatten(1) @ down.flatten(1)).reshape(site.weight_shape)
    return found


def header(path: Path) -> dict[str, Any]:
    """The raw header of a safetensors file."""
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def rewrite(path: Path, change: Any, to: Path | None = None) -> Path:
    """Rewrite the header of a file with `change`; the tensors' bytes stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    parsed = json.loads(data[8 : 8 + length])
    text = json.dumps(change(parsed) or parsed).encode()
    target = to or path.with_name("changed.safetensors")
    target.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return target

"""What every LoRA format shares: low-rank pairs of a file into veneer's own lora, and what may be written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.injection import Attachment, SaveError
from veneer.injection.sites import WeightSite

ENCODERS = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}

NATIVE = "The native file (Attachment.save) holds it."


@dataclass(frozen=True)
class Found:
    """One weight that a file changes by s·B A with s = alpha / rank."""

    site: WeightSite
    rank: int
    alpha: float


def config_of(found: Mapping[str, Found]) -> dict[str, Any]:
    """Config of lora: the commonest rank and alpha, and the others by site."""
    rank = Counter(f.rank for f in found.values()).most_common(1)[0][0]
    alpha = Counter(f.alpha for f in found.values()).most_common(1)[0][0]
    return {
        "rank": rank,
        "alpha": alpha or None,  # lora takes 0 for "as the rank"
        "ranks": {f"name:{n}": f.rank for n, f in found.items() if f.rank != rank},
        "alphas": {f"name:{n}": f.alpha for n, f in found.items() if f.alpha != alpha or not alpha},
    }


def shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor with or without the ones of a 1×1 kernel, if nothing else keeps it from `shape`; else as it is."""
    only_ones = tensor.shape[:2] == shape[:2] and tensor.numel() == math.prod(shape)
    return tensor.reshape(shape) if only_ones else tensor


def refuse(attachment: Attachment, target: Path, files: str) -> None:
    """Raise if something of an attachment is no LoRA. `files`: what the format is called in the error."""
    if attachment.method.name != "lora":
        message = f"{target}: '{attachment.name}' is {attachment.method.name}; {files} hold lora. {NATIVE}"
        raise SaveError(message, file=target, where=attachment.name, given=attachment.method.name, expected="lora")
    refuse_trained(attachment, target, files)


def refuse_trained(attachment: Attachment, target: Path, files: str, but: Collection[str] = ()) -> None:
    """Raise if an attachment has trained parameters of the base as well. `but`: those that have a place."""
    extra = [key for key in attachment.state_dict() if key.rpartition(":")[0] not in attachment.parts and key not in but]
    if extra:
        raise SaveError(
            f"{target}: '{attachment.name}' has trained {', '.join(extra[:4])} of the base as well, for which {files} have no "
            f"place. {NATIVE}",
            file=target,
            where=attachment.name,
            given=tuple(extra),
            expected=(),
        )


def component_of(tower: nn.Module) -> str:
    """Where a bare model would be in a pipeline, or nothing."""
    name = type(tower).__name__
    if type(tower).__module__.startswith("diffusers."):
        return "unet" if "UNet" in name else "transformer"
    return ENCODERS.get(name, "")

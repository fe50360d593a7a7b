"""Parts shared by all LoRA formats: converting low-rank factors to veneer's lora, and checks before writing."""

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

NATIVE = "Save it with Attachment.save (native format)."


@dataclass(frozen=True)
class LoRALayer:
    """One weight of a file, updated by s·B A with s = alpha / rank."""

    site: WeightSite
    rank: int
    alpha: float


def config_of(found: Mapping[str, LoRALayer]) -> dict[str, Any]:
    """Config of lora: the most common rank and alpha, and exceptions by site."""
    rank = Counter(f.rank for f in found.values()).most_common(1)[0][0]
    alpha = Counter(f.alpha for f in found.values()).most_common(1)[0][0]
    common = {"rank": rank, "alpha": alpha}
    own = {n: {k: v for k, v in (("rank", f.rank), ("alpha", f.alpha)) if v != common[k]} for n, f in found.items()}
    return {**common, "by_site": {f"name:{n}": options for n, options in own.items() if options}}


def match_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Adds or removes the singleton dimensions of a 1×1 kernel if this gives `shape`; otherwise returns the tensor unchanged."""
    only_ones = tensor.shape[:2] == shape[:2] and tensor.numel() == math.prod(shape)
    return tensor.reshape(shape) if only_ones else tensor


def reject_other_methods(attachment: Attachment, target: Path, files: str) -> None:
    """Raises if the attachment is not a plain LoRA. `files`: plural name of the format's files, for the error message."""
    if attachment.method.name != "lora":
        message = f"{target}: '{attachment.name}' uses {attachment.method.name}, but {files} hold lora. {NATIVE}"
        raise SaveError(message, file=target, where=attachment.name, given=attachment.method.name, expected="lora")
    reject_trained_base(attachment, target, files)


def reject_trained_base(attachment: Attachment, target: Path, files: str, but: Collection[str] = ()) -> None:
    """Raises if the attachment has trained base parameters. `but`: those that the format can hold."""
    extra = [key for key in attachment.state_dict() if key.rpartition(":")[0] not in attachment.parts and key not in but]
    if extra:
        raise SaveError(
            f"{target}: '{attachment.name}' also trained the base parameters {', '.join(extra[:4])}, which {files} cannot hold. "
            f"{NATIVE}",
            file=target,
            where=attachment.name,
            given=tuple(extra),
            expected=(),
        )


def component_of(tower: nn.Module) -> str:
    """Name of a bare model's component in a pipeline, or an empty string."""
    name = type(tower).__name__
    if type(tower).__module__.startswith("diffusers."):
        return "unet" if "UNet" in name else "transformer"
    return ENCODERS.get(name, "")

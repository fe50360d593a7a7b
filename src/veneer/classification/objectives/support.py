"""Methods and options that multi-label classification does not support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from veneer.injection import methods
from veneer.injection.errors import OptionError

from ..models.loading import is_clip_name


def check_support(model: str, names: Sequence[str], keeps_head: bool, shots: int | None) -> None:
    """Raises if a run with several labels per image needs one label per image.

    Args:
        model: as in `TransferConfig`. `names`: of the methods. `keeps_head`: whether the model's own head is kept.
        shots: training images per class, or None.
    Raises:
        OptionError: `shots`, which counts the images of each class; a CLIP, whose class texts are compared by a softmax; a method
            that keeps the model's own head, or this head itself, because its classes exclude each other; a method that caches
            images of each class.
    """
    if shots is not None:
        message = f"shots is {shots}, but images with several labels count for several classes. Leave out --shots."
        raise OptionError(message, option="shots", given=shots, expected=None)
    if is_clip_name(model):
        message = (
            f"model is {model}, whose class texts are compared by a softmax; multi_label needs a new linear head. Pass --model "
            "bundled for the image encoder of the bundled CLIP, or a timm name such as vit_base_patch16_clip_224.openai."
        )
        raise OptionError(message, option="model", given=model, expected="bundled")
    for name in names:
        reason = _single_label_reason(name)
        if reason:
            message = f"{name} {reason}; multi_label needs a new linear head. Use another method, such as lora."
            raise OptionError(message, option="method", method=name, given=name, expected="a new linear head")
    if keeps_head:
        message = "head is kept, but its classes exclude each other; multi_label needs a new one. Leave out --head."
        raise OptionError(message, option="head", given="kept", expected="fresh")


def _single_label_reason(name: str) -> str:
    """Why a method needs one label per image, or ""."""
    method = methods.get(name)
    if method.keeps_head:
        return "keeps the model's own head, whose classes exclude each other"
    caches_classes = any(field.name == "shots" for field in fields(method))
    return "caches as many images of each class (shots), by their one label" if caches_classes else ""

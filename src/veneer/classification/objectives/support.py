"""Methods and options that multi-label classification does not support."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.injection import methods
from veneer.injection.errors import OptionError

from ..models.loading import is_clip_name

if TYPE_CHECKING:
    from ..config import TransferConfig


def check_support(config: TransferConfig) -> None:
    """Raises if a run with several labels per image needs one label per image.

    Raises:
        OptionError: `shots`, which counts the images of each class; a CLIP, whose class texts are compared by a softmax; a method
            that keeps the model's own head, or this head itself, because its classes exclude each other.
    """
    if not config.multi_label:
        return
    if config.shots is not None:
        message = f"shots is {config.shots}, but images with several labels count for several classes. Leave out --shots."
        raise OptionError(message, option="shots", given=config.shots, expected=None)
    if is_clip_name(config.model):
        message = (
            f"model is {config.model}, whose class texts are compared by a softmax; multi_label needs a new linear head. Pass "
            "--model bundled for the image encoder of the bundled CLIP, or a timm name such as vit_base_patch16_clip_224.openai."
        )
        raise OptionError(message, option="model", given=config.model, expected="bundled")
    for name in config.names():
        if methods.get(name).keeps_head:
            reason = "keeps the model's own head, whose classes exclude each other"
            message = f"{name} {reason}; multi_label needs a new linear head. Use another method, such as lora."
            raise OptionError(message, option="method", method=name, given=name, expected="a new linear head")
    if config.keeps_head():
        message = "head is kept, but its classes exclude each other; multi_label needs a new one. Leave out --head."
        raise OptionError(message, option="head", given="kept", expected="fresh")

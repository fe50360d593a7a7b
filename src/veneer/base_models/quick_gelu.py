"""Detection of a mismatch between an open_clip model's activation and the one its weights were trained with."""

from __future__ import annotations

from pathlib import Path

from torch import nn

SUFFIX = "-quickgelu"
BLOCKS = ("ResidualAttentionBlock", "CustomResidualAttentionBlock")


def quick_gelu_mismatch(model: nn.Module, name: str, pretrained: str | Path) -> str | None:
    """Error message if weights trained with QuickGELU, x·sigmoid(1.702 x), are loaded into a model with GELU, or vice versa.

    Such weights load without an error but give wrong features. open_clip warns if they are loaded by tag, but not from a file.

    Args:
        model: the model. Towers of timm and transformers define their own activations and are ignored.
        name: the architecture in open_clip, such as `ViT-B-32` or `ViT-B-32-quickgelu`.
        pretrained: a tag such as `openai`, or a file, which is recognized by its name if open_clip publishes it.
    Returns:
        The message, or None if the activations match or are unknown.
    """
    blocks = [m for m in model.modules() if type(m).__name__ in BLOCKS]
    plain = name.removesuffix(SUFFIX)
    trained = _trained_with(plain, str(pretrained))
    built = any(type(m).__name__ == "QuickGELU" for block in blocks for m in block.modules())
    if not blocks or trained is None or built == trained:
        return None
    here, there = ("QuickGELU", "GELU") if built else ("GELU", "QuickGELU")
    return (
        f"{name}: the model uses {here}, but the weights '{pretrained}' were trained with {there}. "
        f"Use '{plain}{SUFFIX if trained else ''}', or quick_gelu={trained} in the configuration."
    )


def _trained_with(name: str, pretrained: str) -> bool | None:
    """Whether the weights were trained with QuickGELU, by open_clip's tables, or None if unknown."""
    from open_clip import pretrained as tables

    tags = [pretrained] if tables.is_pretrained_cfg(name, pretrained) else tables.list_pretrained_tags_by_model(name)
    configs = [tables.get_pretrained_cfg(name, tag) for tag in tags]
    if tags != [pretrained]:
        configs = [c for c in configs if Path(c.get("url", "")).name == Path(pretrained).name]
    values = {bool(c.get("quick_gelu", False)) for c in configs}
    return values.pop() if len(values) == 1 else None

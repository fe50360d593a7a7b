"""Whether a model of open_clip computes the activation that its weights were trained with."""

from __future__ import annotations

from pathlib import Path

from torch import nn

SUFFIX = "-quickgelu"
BLOCKS = ("ResidualAttentionBlock", "CustomResidualAttentionBlock")


def quick_gelu_mismatch(model: nn.Module, name: str, pretrained: str | Path) -> str | None:
    """What is wrong if weights that were trained with x·sigmoid(1.702 x) run in a model with GELU, or the other way round.

    Such weights load and run, and give other features than they should. open_clip warns where a tag is loaded, but not where the
    same weights come as a file.

    Args:
        model: as it was built. Towers of timm and of transformers have activations of their own and do not count.
        name: the architecture in open_clip, such as `ViT-B-32` or `ViT-B-32-quickgelu`.
        pretrained: a tag such as `openai`, or a file; one that open_clip publishes is known by its name.
    Returns:
        what does not fit and what to do, or None where it fits or open_clip's tables do not say.
    """
    blocks = [m for m in model.modules() if type(m).__name__ in BLOCKS]
    plain = name.removesuffix(SUFFIX)
    trained = _trained_with(plain, str(pretrained))
    built = any(type(m).__name__ == "QuickGELU" for block in blocks for m in block.modules())
    if not blocks or trained is None or built == trained:
        return None
    here, there = ("QuickGELU", "GELU") if built else ("GELU", "QuickGELU")
    return (
        f"{name}: the model computes {here}, the weights '{pretrained}' were trained with {there}. "
        f"Build it as '{plain}{SUFFIX if trained else ''}', or with quick_gelu={trained} in its configuration."
    )


def _trained_with(name: str, pretrained: str) -> bool | None:
    """Whether with QuickGELU, by open_clip's tables, or None where they do not say."""
    from open_clip import pretrained as tables

    tags = [pretrained] if tables.is_pretrained_cfg(name, pretrained) else tables.list_pretrained_tags_by_model(name)
    configs = [tables.get_pretrained_cfg(name, tag) for tag in tags]
    if tags != [pretrained]:
        configs = [c for c in configs if Path(c.get("url", "")).name == Path(pretrained).name]
    answers = {bool(c.get("quick_gelu", False)) for c in configs}
    return answers.pop() if len(answers) == 1 else None

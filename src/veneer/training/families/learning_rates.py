"""Default learning rates of a base model's family, without loading the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from veneer.base_models.architectures import PIPELINES
from veneer.base_models.folders import read_json
from veneer.base_models.loading import find

from . import families
from .family import Family


def family_learning_rates(base: str | Path) -> Mapping[str, float]:
    """Method name to its default learning rate on a base model without a preset: `Family.learning_rates` of its family.

    Args:
        base: base model. Of one without a `model_index.json` on this machine, such as a hub name, the family is unknown, and the
            rates are those that families have in common.
    Raises:
        BaseModelError: no such base model.
    """
    name = _pipeline_name(base)
    kind = next((kind for kind in families().values() if name in kind.pipelines), Family)
    return kind.learning_rates


def _pipeline_name(base: str | Path) -> str | None:
    """Name of the class of a base model's pipeline, if it is known without a download."""
    if base in PIPELINES and not Path(base).exists():
        return PIPELINES[str(base)][0]
    source = find(base)
    index = source / "model_index.json" if isinstance(source, Path) else None
    return str(read_json(index).get("_class_name")) if index is not None and index.is_file() else None

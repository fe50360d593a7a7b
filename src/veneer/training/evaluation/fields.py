"""Options of the evaluation at the end of a personalization run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.base_models import BUNDLED, current_name
from veneer.injection.errors import OptionError

from ..report.feature_models import check_features
from .local_features import OFF, default_features

EVAL_SEEDS = 3
"""Images per prompt of a full evaluation."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFields:
    """What is evaluated.

    Args:
        eval: images generated at the end to compare with the base model: `none`, `quick` (one for each of two prompts), `full`
            (`eval_seeds` for each prompt), or `auto`, the largest of these that takes at most a quarter of the training time
            (default: full on the bundled base model and with `eval_seeds`, else auto).
        eval_seeds: images per prompt of a full evaluation; 0 disables its metrics (default: 3).
        features: image model that measures similarity to the photos: `bundled`, a folder, a name such as
            `timm:vit_small_patch16_224.dino`, or `none` for no metrics (default: bundled for the bundled base model, else a
            CLIP or DINOv2 in the local cache, else none).
    """

    eval: Literal["auto", "none", "quick", "full"] | None = None
    eval_seeds: int | None = None
    features: str | None = None

    def evaluation_defaults(self, base: str | Path) -> dict[str, Any]:
        """The fields with their defaults for a base model. Without a feature model there are no metrics.

        Raises:
            VeneerError: an unknown feature model, or more images than the evaluation has.
        """
        features = self.features or default_features(base)
        if features != OFF:
            check_features(features)
        seeds = self.eval_seeds
        limit = {"none": 0, "quick": 1}.get(self.eval or "")
        if limit is not None and seeds is not None and seeds > limit:
            message = f"eval_seeds is {seeds} with --eval {self.eval}, which has {limit}; expected --eval full, or no number."
            raise OptionError(message, option="eval_seeds", given=seeds, expected=limit)
        is_full = current_name(str(base)) in BUNDLED or self.eval_seeds is not None
        default = EVAL_SEEDS if limit is None else limit
        return {
            "eval": self.eval or ("full" if is_full else "auto"),
            "eval_seeds": 0 if features == OFF else default if seeds is None else seeds,
            "features": features,
        }

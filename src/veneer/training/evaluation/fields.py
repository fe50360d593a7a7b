"""Options of the evaluation at the end of a personalization run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.base_models import BUNDLED, current_name

from ..report.feature_models import check_features
from .local_features import OFF, default_features

EVAL_SEEDS = 3
"""Images per prompt of a full evaluation."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFields:
    """What is evaluated.

    Args:
        eval: images generated at the end, with and without the adapter: `none`, `quick` (one for each of two prompts), `full`, or
            `auto`, the largest of these that takes at most a quarter of the training time (default: full on the bundled base
            model and with `--eval-seeds`, else auto).
        eval_seeds: images per prompt for the metrics of a full evaluation; 0 disables the metrics (default: 3).
        features: image model of the metrics: `bundled`, a folder, a name such as `timm:vit_small_patch16_224.dino`, or `none`
            (default: bundled for the bundled base model, else a CLIP or DINOv2 in the local cache, else none).
    """

    eval: Literal["auto", "none", "quick", "full"] | None = None
    eval_seeds: int | None = None
    features: str | None = None

    def evaluation_defaults(self, base: str | Path) -> dict[str, Any]:
        """The fields with their defaults for a base model. Without a feature model there are no metrics.

        Raises:
            VeneerError: an unknown feature model.
        """
        features = self.features or default_features(base)
        if features != OFF:
            check_features(features)
        is_full = current_name(str(base)) in BUNDLED or self.eval_seeds is not None
        seeds = EVAL_SEEDS if self.eval_seeds is None else self.eval_seeds
        return {
            "eval": self.eval or ("full" if is_full else "auto"),
            "eval_seeds": 0 if features == OFF else seeds,
            "features": features,
        }

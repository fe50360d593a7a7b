"""The verdict of a control run: whether generated images follow the map, from intervals over held-out subjects.

With agreement f of images under the map, n without and o under another subject's map, their paired differences d = f − n and
e = f − o, and **share** = mean d / (1 − n), the part of the distance to full agreement that was covered:

| outcome | d | e | share |
|---|---|---|---|
| `learned` | whole interval above 0 | whole interval above 0 | ≥ 0.15, two thirds of the least default run in docs/results |
| `partly` | one of the two intervals above 0, the mean of the other above 0 | | any |
| `not_learned` | anything else; "worse" if the whole interval of d is below 0 | | |

A training loss that rose (95 % interval of the difference between the means of the last and the first quarter above 0) makes at
most `partly`: the control starts without effect, so a higher loss is damage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.training.report.metrics import MeanInterval, difference
from veneer.training.report.verdict import Verdict

if TYPE_CHECKING:
    from .config import ControlConfig
    from .evaluation import ControlMetrics

SHARE = 0.15
"""Of the distance from no map to full agreement, for `learned`."""
LEAST = 8
"""Minimum number of losses per quarter for a trend."""
EVALUATE = "evaluate: --validation 0.1 --eval-seeds 2"


def verdict(metrics: ControlMetrics | None, losses: Sequence[float], config: ControlConfig) -> Verdict:
    """The verdict of a finished run.

    Args:
        metrics: None if nothing was evaluated. `losses`: mean loss of each step. `config`: completed, for the advice.
    """
    trend = loss_trend(losses)
    rose = trend is not None and trend.low is not None and trend.low > 0
    loss = () if trend is None else (_loss(trend),)
    if metrics is None:
        why = "Nothing was evaluated (--eval-seeds 0, or no held-out images), so there are no scores."
        return Verdict("unknown", "It was not evaluated; look at the previews.", (why, *loss), (EVALUATE,))
    reasons, (over_free, half) = (str(metrics), *loss), metrics.over_free
    if not math.isfinite(half):
        return Verdict("unknown", "One held-out image is too few to tell.", reasons, (EVALUATE,))
    free, misled = _clear(metrics.over_free), _clear(metrics.over_misled)
    share = over_free / (1 - metrics.free) if metrics.free < 1 else 0.0
    reasons = (f"{reasons[0]}; {max(0.0, share):.0%} of the way to full agreement.", *loss)
    if free and misled and share >= SHARE and not rose:
        return Verdict("learned", "Images follow the condition, and not those of other images.", reasons)
    if (free or misled) and min(over_free, metrics.over_misled[0]) > 0:
        return Verdict("partly", "Images follow the condition a little.", reasons, _advice(config, rose))
    if over_free + half < 0:
        return Verdict("not_learned", "Images agree less with the condition than without it.", reasons, _advice(config, True))
    return Verdict("not_learned", "Images do not clearly follow the condition.", reasons, _advice(config, rose))


def loss_trend(losses: Sequence[float]) -> MeanInterval | None:
    """Mean loss of the last quarter minus that of the first, with its 95 % interval (Welch); None with too few steps."""
    quarter = len(losses) // 4
    return difference(losses[-quarter:], losses[:quarter]) if quarter >= LEAST else None


def _clear(difference: tuple[float, float]) -> bool:
    mean, half = difference
    return math.isfinite(half) and mean - half > 0


def _loss(trend: MeanInterval) -> str:
    word = "rose" if (trend.low or 0) > 0 else "fell" if (trend.high or 0) < 0 else "did not clearly change"
    return f"The training loss {word}: last quarter of the steps minus the first {trend}."


def _advice(config: ControlConfig, harmed: bool) -> tuple[str, ...]:
    usual, steps = config.default_steps(), config.steps or 0
    found = [f"lower the learning rate: --learning-rate {(config.learning_rate or 0) / 2:g}"] if harmed else []
    if steps < usual or not harmed:
        found.append(f"train longer: --steps {usual if steps < usual else 2 * steps}")
    if config.data is None and config.generated_images < 384:
        found.append("train on more images: --generated-images 384")
    elif config.data is not None:
        found.append("train on more images")
    return tuple(found)

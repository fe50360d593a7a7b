"""The cheapest changes of a run that make it fit into a memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from veneer.injection.errors import UnsupportedSite

from ..personalization_config import PersonalizeConfig
from .memory_prediction import MemoryPrediction, MemoryPredictor

Change = Callable[[PersonalizeConfig], PersonalizeConfig]


@dataclass(frozen=True)
class Proposal:
    """Changes of a run and what is predicted with them.

    Args:
        flags: of the changed options, in the order of their cost. `config`: the changed run. `prediction`: its memory.
        fits: whether it suffices; else these are all changes, and the prediction is the least.
    """

    flags: tuple[str, ...]
    config: PersonalizeConfig
    prediction: MemoryPrediction
    fits: bool


def propose(predictor: MemoryPredictor, config: PersonalizeConfig, capacity: int) -> Proposal:
    """The cheapest change that makes a run fit, or several of which none can be left out.

    In the order of their cost: gradient checkpointing, batch 1, offloading, bfloat16, 8 and 4 bits for the denoiser, 4 bits for
    all, lower resolutions. If no single change suffices, changes are added in this order until they do, and then those that turn
    out unnecessary are left out again.

    Args:
        config: with defaults, a run that does not fit. `capacity`: bytes.
    """
    first = predictor.predict(config, 0)
    changes: list[tuple[str, Change]] = []
    for flag, change in _changes(config, first, predictor.device):
        try:
            single = predictor.predict(change(config), capacity)
        except UnsupportedSite:  # the method does not work on quantized layers
            continue
        if single.peak <= capacity:
            return Proposal((flag,), change(config), single, True)
        changes.append((flag, change))
    chosen: list[tuple[str, Change]] = []
    for added in changes:
        chosen = [*(each for each in chosen if _option(each) != _option(added)), added]
        if _predict(predictor, config, chosen, capacity).peak <= capacity:
            chosen = _without_spare(predictor, config, chosen, capacity)
            return _proposal(predictor, config, chosen, True)
    return _proposal(predictor, config, chosen, False)


def _changes(config: PersonalizeConfig, first: MemoryPrediction, device: str) -> Iterator[tuple[str, Change]]:
    """(flag, change) of the options that are not at their cheapest yet."""
    if not config.gradient_checkpointing:
        yield "--gradient-checkpointing", lambda c: replace(c, gradient_checkpointing=True)
    if (config.batch or 1) > 1:
        yield "--batch 1", lambda c: replace(c, batch=1)
    if not config.offload_encoders and device != "cpu":
        yield "--offload-encoders", lambda c: replace(c, offload_encoders=True)
    if first.formats["vae"] == "float32":
        yield "--dtype bfloat16", lambda c: replace(c, dtype="bfloat16")
    if not config.quantize:
        for kind in ("int8", "nf4"):
            yield f"--quantize {kind}", lambda c, kind=kind: replace(c, quantize=(kind,))  # type: ignore[misc]
    everything = tuple(f"{name}=nf4" for name in first.weights if name != "vae")
    if len(everything) > 1 and set(config.quantize) != set(everything):
        yield f"--quantize {' '.join(everything)}", lambda c: replace(c, quantize=everything)
    for share in (0.75, 0.5, 0.25):
        side = round(first.resolution * share) // first.multiple * first.multiple
        if side:
            yield f"--resolution {side}", lambda c, side=side: replace(c, resolution=side)  # type: ignore[misc]


def _option(change: tuple[str, Change]) -> str:
    return change[0].split()[0]


def _apply(config: PersonalizeConfig, changes: list[tuple[str, Change]]) -> PersonalizeConfig:
    for _, change in changes:
        config = change(config)
    return config


def _predict(
    predictor: MemoryPredictor, config: PersonalizeConfig, changes: list[tuple[str, Change]], limit: int | None
) -> MemoryPrediction:
    return predictor.predict(_apply(config, changes), limit)


def _without_spare(
    predictor: MemoryPredictor, config: PersonalizeConfig, chosen: list[tuple[str, Change]], capacity: int
) -> list[tuple[str, Change]]:
    """The changes without those that are not needed, the most expensive ones first."""
    for change in reversed(chosen):
        fewer = [each for each in chosen if each is not change]
        if fewer and _predict(predictor, config, fewer, capacity).peak <= capacity:
            chosen = fewer
    return chosen


def _proposal(predictor: MemoryPredictor, config: PersonalizeConfig, chosen: list[tuple[str, Change]], fits: bool) -> Proposal:
    changed = _apply(config, chosen)
    return Proposal(tuple(flag for flag, _ in chosen), changed, predictor.predict(changed), fits)

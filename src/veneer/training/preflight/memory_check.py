"""Whether a run fits into the memory of a device, from the configs of its base model."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.injection.errors import OptionError

from ..personalization_config import PersonalizeConfig
from .checks import Concern
from .estimates import size
from .memory_changes import Proposal, propose
from .memory_prediction import MemoryPrediction, MemoryPredictor
from .memory_size import Capacity, parse_capacity
from .preflight import PreflightError


@dataclass(frozen=True)
class MemoryCheck:
    """Predicted memory of a run and the memory of the device.

    Args:
        base: name of the base model. `capacity`: of the device. `prediction`: for the run.
        proposal: the cheapest changes that make it fit; None if it fits.
    """

    base: str
    capacity: Capacity
    prediction: MemoryPrediction
    proposal: Proposal | None

    def table(self) -> str:
        """Lines for a terminal: the parts, and the peak of each phase."""
        predicted = self.prediction
        return f"memory of {self.base} at {predicted.resolution} pixels, batch {predicted.batch}, from shapes:\n{predicted}"

    def verdict(self) -> str:
        """One sentence: whether the run fits, and the changes that make it fit."""
        peak, free = self.prediction.peak, self.capacity.size
        if self.proposal is None:
            return f"fits: {size(peak)} of {size(free)}, {size(free - peak)} are left for the driver and the allocator"
        flags, least = " ".join(self.proposal.flags), size(self.proposal.prediction.peak)
        start = f"the run needs {size(peak)}, more than {size(free)}"
        if self.proposal.fits:
            return f"{start}: with {flags} it needs {least}"
        return f"{start}, and with {flags} still {least}: use a smaller base model or a device with more memory"

    def check(self) -> None:
        """Raises if the run does not fit.

        Raises:
            PreflightError: with the changes that make it fit.
        """
        if self.proposal is not None:
            raise PreflightError(self.verdict(), given=(Concern("memory", self.verdict(), "error"),))


def check_memory(config: PersonalizeConfig) -> MemoryCheck:
    """Predicts the memory of a run, and compares it with `config.check`, a size such as `12GB` or a device.

    Args:
        config: the run; it needs neither photos nor weights.
    Raises:
        OptionError: an invalid size or option. BaseModelError: a base model without configs on this machine.
    """
    if config.shard_base:
        message = "--check counts the base model as a whole; expected no --shard-base."
        raise OptionError(message, option="shard_base", given=True, expected=False)
    capacity = parse_capacity(config.check or "")
    config = config.with_defaults()
    predictor = MemoryPredictor(capacity.device)
    prediction = predictor.predict(config)
    fits = prediction.peak <= capacity.size
    return MemoryCheck(config.base, capacity, prediction, None if fits else propose(predictor, config, capacity.size))

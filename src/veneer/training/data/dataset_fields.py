"""Options of a run that has several datasets or a validation set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.injection.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class DatasetFields:
    """Datasets and validation photos of a run.

    Args:
        datasets: several datasets instead of `photos`, each with its own concept, captions and repeats, in quotes:
            `'path=toys,concept=<toy>,class_word=toy,repeats=2'`. Other keys are regularization=true for class images,
            caption_extension, and options of data such as resolution. In a config file they are `[[datasets]]` tables.
        validation: folder with held-out photos, on which the validation loss is measured, at fixed timesteps and seeds.
        validation_share: share of the photos of each dataset to hold out as validation photos, 0 to 1.
        validation_every: optimizer steps between measurements of the validation loss (default: a tenth of the steps).
    """

    datasets: tuple[Mapping[str, Any], ...] = ()
    validation: Path | None = None
    validation_share: float = 0.0
    validation_every: int | None = None

    def check_validation(self) -> None:
        """Checks the values of validation.

        Raises:
            OptionError: a share outside 0 to 1, or an interval below 1.
        """
        share, every = self.validation_share, self.validation_every
        if not 0.0 <= share < 1.0:
            message = f"validation_share is {share}; expected 0 or more and below 1."
            raise OptionError(message, option="validation_share", given=share, expected=(0, 1))
        if every is not None and every < 1:
            message = f"validation_every is {every}; expected at least 1."
            raise OptionError(message, option="validation_every", given=every, expected=1)

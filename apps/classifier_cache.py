"""Questions to taught classifiers, which stay loaded from one question to the next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from veneer.classification.predict import Predictor, open_predictor
from veneer.injection import StateError, VeneerError

KEPT = 2
"""Classifiers that stay loaded."""


class Answers:
    """Answers one question after the other; of the classifiers the `KEPT` that were asked last stay in memory."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], Predictor] = OrderedDict()
        self._one = threading.Lock()

    def ask(self, run: Path, picture: Path, most: int = 5) -> dict[str, float]:
        """The likeliest classes of a picture, with their probabilities.

        Args:
            run: folder of `veneer transfer`. `most`: classes that are told.
        Raises:
            VeneerError: nothing was taught there yet, or the picture cannot be read.
        """
        with self._one:
            prediction = next(self._opened(run).predict([picture], most))
        if prediction.problem:
            raise VeneerError(prediction.problem, file=prediction.image)
        return {prediction.label: prediction.probability, **dict(prediction.others)}

    def _opened(self, run: Path) -> Predictor:
        file = run / "model.json"
        if not file.is_file():
            message = "there are no trained weights yet that could be asked: wait for the end, or stop it."
            raise StateError(message, where=run.name, given="untrained")
        key = (str(run), file.stat().st_mtime_ns)
        if key not in self._kept:
            for old in [old for old in self._kept if old[0] == key[0]]:
                del self._kept[old]  # it went on after a stop
            self._kept[key] = open_predictor(run)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]

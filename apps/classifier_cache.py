"""Cache of loaded classifiers for predictions on the page Classify."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from veneer.classification.predict import Predictor, open_predictor
from veneer.injection import StateError, VeneerError

MAX_CLASSIFIERS = 2
"""Classifiers that stay loaded."""


class ClassifierCache:
    """Classifies one image at a time; keeps the `MAX_CLASSIFIERS` most recently used classifiers in memory."""

    def __init__(self) -> None:
        self._predictors: OrderedDict[tuple[str, int], Predictor] = OrderedDict()
        self._lock = threading.Lock()

    def classify(self, run: Path, image: Path, top: int = 5) -> dict[str, float]:
        """Most probable classes of an image, with their probabilities.

        Args:
            run: folder of `veneer transfer`. `top`: number of classes.
        Raises:
            VeneerError: the run has no trained weights yet, or the image cannot be read.
        """
        with self._lock:
            prediction = next(self._predictor(run).predict([image], top))
        if prediction.problem:
            raise VeneerError(prediction.problem, file=prediction.image)
        return {prediction.label: prediction.probability, **dict(prediction.others)}

    def _predictor(self, run: Path) -> Predictor:
        file = run / "model.json"
        if not file.is_file():
            message = "this run has no trained weights yet. Wait for its end, or stop it."
            raise StateError(message, where=run.name, given="untrained")
        key = (str(run), file.stat().st_mtime_ns)
        if key not in self._predictors:
            for old in [old for old in self._predictors if old[0] == key[0]]:
                del self._predictors[old]  # the run was resumed after a stop
            self._predictors[key] = open_predictor(run)
        self._predictors.move_to_end(key)
        while len(self._predictors) > MAX_CLASSIFIERS:
            self._predictors.popitem(last=False)
        return self._predictors[key]

"""Ask a taught classifier about pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from veneer.classification.predict import Answer, find, open_predictor
from veneer.injection import OptionError, VeneerError

__all__ = ["PredictConfig", "predict"]


@dataclass(frozen=True)
class PredictConfig:
    """Configuration of `veneer predict` and its defaults.

    Args:
        folder: folder that `veneer transfer --out` has written.
        images: images, and folders of images.
        top: classes to list per image.
        format: `text`, `json` (one line per image) or `csv`.
        batch: images per forward pass.
    """

    folder: Path
    images: tuple[Path, ...] = ()
    top: int = 3
    format: str = "text"
    batch: int = 32

    def __post_init__(self) -> None:
        if self.format not in FORMS:
            message = f"format is {self.format!r}; expected one of {', '.join(FORMS)}."
            raise OptionError(message, option="format", given=self.format, expected=tuple(FORMS))
        for name, given in (("top", self.top), ("batch", self.batch)):
            if given < 1:
                raise OptionError(f"{name} is {given}; expected at least 1.", option=name, given=given, expected=1)


def predict(config: PredictConfig) -> Iterator[str]:
    """A line for each picture: its first classes and their probabilities. A picture that cannot be read gets the reason.

    Raises:
        VeneerError: no finished run in the folder, no pictures, or none that can be read.
    """
    pictures = find(config.images)
    if not pictures:
        message = "no images: give some, or a folder of them, after the run's folder."
        raise OptionError(message, option="images", given=())
    if config.format == "csv":
        yield _row(["picture", "label", "probability", "problem"])
    read = False
    for answer in open_predictor(config.folder).answers(pictures, config.top, config.batch):
        read = read or not answer.problem
        yield FORMS[config.format](answer)
    if not read:
        message = f"none of the {len(pictures)} images could be read."
        raise VeneerError(message, where="images", given=tuple(map(str, pictures)))


def _text(answer: Answer) -> str:
    if answer.problem:
        return f"{answer.picture}: {answer.problem}"
    told = [f"{label} {share:.1%}" for label, share in ((answer.label, answer.probability), *answer.others)]
    return f"{answer.picture}: {', '.join(told)}"


def _json(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False)


def _csv(answer: Answer) -> str:
    return _row([answer.picture, answer.label, "" if answer.problem else repr(answer.probability), answer.problem])


def _row(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


FORMS = {"text": _text, "json": _json, "csv": _csv}

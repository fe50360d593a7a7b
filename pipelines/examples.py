"""Write the bundled example images, which the README's commands use, to a folder."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from veneer import base_models
from veneer.classification.data.digits import digits
from veneer.injection import SaveError

PER_CLASS = 40
NEW = 6


@dataclass(frozen=True)
class ExamplesConfig:
    """Configuration of `veneer examples`.

    Args:
        folder: new or empty folder.
    """

    folder: Path = Path("photos")


def examples(config: ExamplesConfig) -> list[str]:
    """Writes `octopus/`, five images of one subject with captions; `sneaker/`, six photos of another; `digits/CLASS/`, 40 images
    of each of ten classes; and `new/`, six more digits, without labels.

    Returns:
        One line per folder.
    Raises:
        VeneerError: the folder is not empty.
    """
    folder = config.folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        message = f"{folder}: exists and is not an empty folder; expected a new or empty folder. Nothing was written."
        raise SaveError(message, file=folder, given="exists")
    octopus, sneaker = (shutil.copytree(base_models.examples(name), folder / name) for name in base_models.EXAMPLES)
    labeled, new = _write_digits(folder / "digits", folder / "new")
    return [
        f"{octopus}: {len(list(octopus.glob('*.png')))} images of one subject, with captions",
        f"{sneaker}: {len(list(sneaker.glob('*.jpg')))} photos of another subject (CC BY 4.0, see LICENSE.md there)",
        f"{folder / 'digits'}: {labeled} handwritten digits in ten classes",
        f"{folder / 'new'}: {new} digits without labels",
    ]


def _write_digits(labeled: Path, new: Path) -> tuple[int, int]:
    """Writes the first `PER_CLASS` of each class as `CLASS/NAME.png`, and the last `NEW` of all; returns both counts."""
    source = digits()
    by_class = defaultdict(list)
    for example in source.examples:
        by_class[source.classes[example.label]].append(example)
    for name, found in by_class.items():
        (labeled / name).mkdir(parents=True)
        for example in found[:PER_CLASS]:
            (labeled / name / f"{Path(example.name).stem}.png").write_bytes(source.content(example))
    new.mkdir()
    for example in source.examples[-NEW:]:
        (new / f"{Path(example.name).stem}.png").write_bytes(source.content(example))
    return sum(min(PER_CLASS, len(found)) for found in by_class.values()), NEW

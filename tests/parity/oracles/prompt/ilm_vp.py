"""ILM-VP beside its authors' frame and label map."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.parity.measure import Row, largest_difference, measure, randn
from tests.parity.models import perturb_trained
from tests.parity.oracle import Repository
from veneer.injection.sites import PixelSite, Port
from veneer.methods.prompt.pixels._label_map import one_to_one
from veneer.methods.prompt.pixels.ilm_vp import ILMVP

ORACLE = Repository("OPTML-Group/ILM-VP", "84ca0424dce5df9972b9ab6b5a6ddc0f706e8223")
METHODS = ("ilm_vp",)
OUTER, INNER = 28, 16
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)


def rows() -> list[Row]:
    """A frame around images that are as large as its field, and 50 tables of predictions."""
    return [
        Row(
            "ilm_vp",
            "framed images, gradients",
            _frame(),
            deviations="images are resized in the adapter; mean and standard deviation are float32",
        ),
        Row("ilm_vp", "label maps of 50 tables", _label_maps()),
    ]


def _frame() -> float:
    code = ORACLE.definitions("models/visual_prompt.py", "ExpansiveVisualPrompt")
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    theirs = code.ExpansiveVisualPrompt(OUTER, np.zeros((INNER, INNER)), normalize=lambda x: (x - mean) / std)
    perturb_trained(theirs)
    site = PixelSite(name="pixels", role="pixels", port=Port("x", "in"), size=(OUTER, OUTER, 3), mean=MEAN, std=STD)
    ours: Any = ILMVP(picture=128).build(site).double()
    images = randn(2, 3, INNER, INNER).sigmoid()
    field = _field(theirs.mask.bool().logical_not()[0])
    border = lambda read: _border(read(theirs.program), ours.border, field)  # noqa: E731
    return measure(lambda: _framed(ours, (images - mean) / std), lambda: theirs(images), [(ours.prompt, border)])


def _framed(ours: Any, field: Any) -> Any:
    """The adapter's output for images of the size of the field, which are not resized."""
    frame = ours.normalize_pixels(ours.prompt.sigmoid()).expand(len(field), -1, -1)
    return ours.border.around(frame, field)


def _field(inside: Any) -> slice:
    rows_of = inside.any(1).nonzero().flatten()
    return slice(int(rows_of[0]), int(rows_of[-1]) + 1)


def _border(program: Any, border: Any, field: slice) -> Any:
    """The pixels around the field in the order of the adapter: above, before, behind, below."""
    parts = program[:, : field.start], program[:, field, : field.start], program[:, field, field.stop :], program[:, field.stop :]
    assert border.inner == (field.stop - field.start,) * 2
    return torch.cat([part.flatten(1) for part in parts], 1)


def _label_maps() -> float:
    code = ORACLE.definitions("algorithms/flm_calculation.py", "predictive_distribution_based_multi_label_mapping")
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(50):
        table = torch.randint(0, 9, (12, 5), generator=generator)
        indices = torch.nonzero(code.predictive_distribution_based_multi_label_mapping(table.clone(), 1))
        order = torch.sort(indices[:, 1]).indices
        pairs.append((one_to_one(table).double(), indices[:, 0][order].double()))
    return largest_difference(pairs)

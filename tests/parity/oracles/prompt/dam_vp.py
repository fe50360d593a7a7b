"""DAM-VP's border beside its authors' prompter."""

from __future__ import annotations

from typing import Any

import torch

from tests.parity.measure import Row, measure, randn
from tests.parity.models import perturb_trained
from tests.parity.oracle import Repository, float64, options
from veneer.methods.prompt.pixels._pixels import Border

ORACLE = Repository("shikiw/DAM-VP", "dec5821ecbee908c4d9efcb66fe81eb553849574")
METHODS = ("dam_vp",)
SIDE, PAD = 28, 6


def rows() -> list[Row]:
    """The border of one cluster on images."""
    code = ORACLE.definitions("models/prompters.py", "PadPrompter")
    with float64():
        theirs = code.PadPrompter(options(prompt_size=PAD, crop_size=SIDE))
        perturb_trained(theirs)
        border, images = Border((SIDE, SIDE), (SIDE - 2 * PAD, SIDE - 2 * PAD)), randn(2, 3, SIDE, SIDE)
        prompt = torch.nn.Parameter(torch.zeros(3, border.pixels))
        inside = torch.zeros(3, *border.inner)

        def read_border(read: Any) -> Any:
            sides = (theirs.pad_up, theirs.pad_left, theirs.pad_right, theirs.pad_down)
            return torch.cat([read(side)[0].flatten(1) for side in sides], 1)

        difference = measure(lambda: images + border.around(prompt, inside), lambda: theirs(images), [(prompt, read_border)])
    text = "no meta-training of the initial prompt"
    return [Row("dam_vp", "bordered images, gradients", difference, deviations=text)]

"""Tip-Adapter beside its authors' evaluation with a cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from tests.methods.classifiers import pictures, tiny
from tests.parity.measure import Row, largest_difference
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("gaopengcuhk/Tip-Adapter", "d0e2d6f8c5feb8b6ce937b757810761f7155d4d5")
METHODS = ("tip_adapter",)
LABELS = torch.tensor([0, 2, 1, 2, 0, 2])


def rows() -> list[Row]:
    """Logits of a small CLIP with the cache of six images."""
    logits_of_calls: list[Tensor] = []
    code = ORACLE.definitions(
        "main.py", "run_tip_adapter", print=lambda *text: None, cls_acc=lambda logits, _: logits_of_calls.append(logits) or 0.0,
        search_hp=lambda *arguments: (2.5, 1.5),
    )  # fmt: skip
    model = tiny().requires_grad_(False)
    model.clip.logit_scale.fill_(math.log(100))
    support, images = pictures(count=6), pictures(count=3) + 1
    keys, features = (normalize(model.encode_image(pixels), dim=-1) for pixels in (support, images))
    texts = normalize(model.head.texts(features), dim=-1)
    config: dict[str, Any] = {"init_beta": 1.0, "init_alpha": 1.17}
    code.run_tip_adapter(config, keys.T, one_hot(LABELS).double(), features, None, features, None, texts.T)
    tuned = attach(model, "tip_adapter", shots=3, alpha=1.5, beta=2.5)
    tuned.prepare([(support, LABELS)])
    text = "α and the number of views are 1 by default; the authors use 1.17 or more, and 10 views"
    return [Row("tip_adapter", "a CLIP: logits", largest_difference([(model(images), logits_of_calls[-1])]), deviations=text)]

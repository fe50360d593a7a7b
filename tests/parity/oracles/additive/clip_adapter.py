"""CLIP-Adapter beside its authors' adapter and mixture of features."""

from __future__ import annotations

from typing import Any

from tests.methods.classifiers import pictures, tiny
from tests.parity.measure import Row, measure
from tests.parity.models import links, perturb_trained
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("gaopengcuhk/CLIP-Adapter", "08d07f8b2ecafc6f1479fe636b26d464d7a5574e")
METHODS = ("clip_adapter",)


def rows() -> list[Row]:
    """Logits of a small CLIP; the authors fix the ratio to 0.2."""
    code = ORACLE.definitions("clip_adapter.py", "Adapter")
    mixture = ORACLE.definitions("clip_adapter.py", "CustomCLIP").CustomCLIP.forward
    adapter = code.Adapter(16, 4)
    perturb_trained(adapter)
    model = tiny().requires_grad_(False)
    image = pictures()
    features, texts = model.encode_image(image), model.head.texts(model.encode_image(image))
    theirs = options(
        image_encoder=lambda pixels: features, adapter=adapter, text_encoder=lambda: texts, logit_scale=model.clip.logit_scale,
        dtype=image.dtype,
    )  # fmt: skip
    ours: Any = attach(model, "clip_adapter").parts["head.features"][1]
    pairs = links(ours, adapter, **{"down.weight": "fc.0.weight", "up.weight": "fc.2.weight"})
    difference = measure(lambda: model(image), lambda: mixture(theirs, image), pairs)
    return [Row("clip_adapter", "a CLIP: logits, gradients", difference)]

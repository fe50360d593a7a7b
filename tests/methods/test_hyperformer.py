"""HyperFormer: y + LN(Up(gelu(Down(y)))) with a hypernetwork for each role or each site, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.bottlenecks import picture, stirred, tiny
from tests.methods.hypernetworks import SMALL, Leaves, change, check_model, hooked
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.hyper.hyperformer import HyperFormer


@pytest.mark.parametrize(
    ("host", "key", "generators"), [("timm_vit", "vit", "role"), ("timm_vit", "vit", "site"), ("timm_swin", "swin", "role")]
)
def test_outputs_and_gradients_of_each_task(host: str, key: str, generators: str) -> None:
    pair = hooked(host, key)
    tuned = attach(pair[1], "hyperformer", tasks=("cats", "dogs"), generators=generators, **SMALL)
    layers = sorted({site.depth or 0 for site, _ in tuned.parts.values()})

    def reference(leaves: Leaves, task: int, site: Any, y: Tensor) -> Tensor:
        key = f"{site.role if generators == 'role' else site.name.replace('.', '_')}-{site.width}"
        parts = [leaves["tasks"][task]]
        if generators == "role":
            parts.append(leaves["layers"][layers.index(site.depth)])
        return change(leaves, key, parts, generators == "role", y)

    check_model(host, key, tuned, pair, reference)


def test_published_counts() -> None:
    """Generators of 65 · (2·768·24 + 24 + 3·768) parameters for each role, or for each site."""
    with torch.device("meta"):
        for generators, expected in (("role", 5_241_200), ("site", 61_213_952)):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0)
            assert attach(vit, "hyperformer", tasks=("a",), generators=generators).report().trainable == expected


def test_materialized_adapters_of_one_task_compute_the_same() -> None:
    model = tiny()
    tuned = attach(model, "hyperformer", tasks=("cats", "dogs"), generators="site", **SMALL)
    stirred(tuned)
    tuned.task = "cats"
    expected = model(picture())
    tuned.materialize("cats")
    assert torch.equal(model(picture()), expected)


def test_wrong_options() -> None:
    with raises(OptionError, method="hyperformer", option="generators", given="layer"):
        HyperFormer(generators="layer")  # type: ignore[arg-type]

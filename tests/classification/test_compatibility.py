"""Compatible methods of a classifier are those whose sites it has."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.classification.config import TransferConfig
from veneer.classification.models.compatibility import compatible_methods
from veneer.injection import hosts, methods
from veneer.injection.attachment.plan import _sites_of_small_models, supports


def test_compatible_methods_match_the_hosts_sites() -> None:
    for model, host in (("timm:vit_tiny_patch16_224", "timm_vit"), ("bundled_clip", "clip_classifier")):
        sites = _sites_of_small_models(hosts.get(host))
        fitting = [name for name in methods.names() if any(supports(methods.get(name), site) for site in sites)]
        assert [name for name in compatible_methods(model) if name != "zero_shot"] == fitting, model
    assert "zero_shot" in compatible_methods("open_clip:ViT-B-32/openai")
    assert "zero_shot" not in compatible_methods("bundled")


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [("dam_vp", {}, 0), ("dam_vp", {"head_free": True}, 3), ("evp", {}, 3), ("evp", {"classes": 2}, 2)],
)
def test_methods_that_keep_a_head_get_the_number_of_classes(method: str, options: dict[str, Any], expected: int) -> None:
    (built,) = TransferConfig(method=method, options={method: options}).build_methods(classes=3, shots=4)
    assert built.config()["classes"] == expected

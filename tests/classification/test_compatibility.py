"""The methods that a classifier is offered are those whose sites it has."""

from __future__ import annotations

from veneer.classification.models.compatibility import taught_by
from veneer.injection import hosts, methods
from veneer.injection.attachment.plan import _offers, fits


def test_what_is_offered_fits_small_models_and_nothing_else_does() -> None:
    for model, host in (("timm:vit_tiny_patch16_224", "timm_vit"), ("bundled_clip", "clip_classifier")):
        offered = _offers(hosts.get(host))
        fitting = [name for name in methods.names() if any(fits(methods.get(name), site) for site in offered)]
        assert [name for name in taught_by(model) if name != "zero_shot"] == fitting, model
    assert "zero_shot" in taught_by("open_clip:ViT-B-32/openai")
    assert "zero_shot" not in taught_by("bundled")

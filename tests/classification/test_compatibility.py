"""Compatible methods of a classifier are those whose sites it has."""

from __future__ import annotations

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

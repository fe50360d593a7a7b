"""Sites that `--text-encoder` adds to those of a method."""

from __future__ import annotations

import pytest

from veneer.injection import methods
from veneer.testing.pipelines import tiny_pipeline
from veneer.training import attach_methods
from veneer.training.attach_methods import trainable_methods

ALONE = {"textual_inversion", "p_plus", "lst", "diffusekrona", "boft", "mona", "coda", "adapter_fusion", "special_tokens"}
"""Methods that train the text encoder by themselves, have no sites in this UNet or in its text encoder, or need options."""


@pytest.mark.parametrize("name", [name for name in trainable_methods() if name not in ALONE])
def test_the_text_encoder_is_adapted_beside_the_default_sites(name: str) -> None:
    """Default patterns without sites are skipped, and the text encoder is adapted for every type of site."""
    pipe = tiny_pipeline("sd")
    (alone,) = attach_methods.attach_all(pipe, [methods.get(name)()], {}, text_encoder=False, seed=0)
    sites = {site.name for site, _ in alone.parts.values()}
    alone.detach()
    (both,) = attach_methods.attach_all(pipe, [methods.get(name)()], {}, text_encoder=True, seed=0)
    found = {site.name: site.component for site, _ in both.parts.values()}
    assert {site for site, component in found.items() if component == "unet"} == sites
    assert "text_encoder" in found.values()


def test_a_method_with_default_sites_in_text_encoders_only_adapts_them() -> None:
    """A UNet has no special tokens; CLIP's text encoder has its start token."""
    (attached,) = attach_methods.attach_all(
        tiny_pipeline("sd"), [methods.get("special_tokens")()], {}, text_encoder=False, seed=0
    )
    assert {site.component for site, _ in attached.parts.values()} == {"text_encoder"}
    assert {site.role for site, _ in attached.parts.values()} == {"block"}
    assert "special_tokens" in trainable_methods()

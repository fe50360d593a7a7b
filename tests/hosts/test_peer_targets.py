"""Default targets of peers match the modules that peft adapts."""

from __future__ import annotations

import pytest

from veneer.hosts._peer_targets import DEFAULTS, peer_targets
from veneer.testing.pipelines import tiny_pipeline


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_towers_have_as_many_targets_as_peft_adapts(family: str) -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline(family)
    rows = peer_targets(pipe)
    assert {row.model for row in rows} <= set(DEFAULTS)
    for row in rows:
        assert f"--target-modules {row.targets[0]}" in str(row)
        model = pipe.components[row.component]
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=list(row.targets)), model)
        assert row.modules == sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()) > 0


def test_a_model_without_a_default_is_listed() -> None:
    import timm

    (row,) = peer_targets(timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=2, img_size=32))
    assert (row.model, row.targets, row.modules) == ("VisionTransformer", (), 0)

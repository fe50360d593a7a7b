"""What LyCORIS' layout or veneer's methods cannot hold is rejected with the reason, and the model is unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import veneer
from tests.raising import raises
from veneer.formats import lycoris
from veneer.injection import LoadError, SaveError, attach
from veneer.testing.pipelines import tiny_pipeline

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"  # 32 × 32
LORA = {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2)}
LOHA = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
LOKR = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}
GLORA = {"a1.weight": (32, 2), "a2.weight": (2, 32), "b1.weight": (32, 2), "b2.weight": (2, 32)}


def file(path: Path, parts: dict[str, Any], name: str = Q) -> Path:
    """A file of one module; shapes become tensors of ones."""
    tensors = {f"{name}.{end}": t if isinstance(t, Tensor) else torch.ones(t) for end, t in parts.items()}
    save_file(tensors, path / "x.safetensors")
    return path / "x.safetensors"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("parts", "part", "data"),
    [
        ({"diff": (32, 32)}, "diff", {"given": "full weights"}),
        ({**LORA, "diff_b": (32,)}, "diff_b", {"given": "full weights"}),
        ({"w_norm": (32,)}, "w_norm", {"given": "norms"}),
        ({"b_norm": (32,)}, "b_norm", {"given": "norms"}),
        ({"oft_diag": (4, 8, 8)}, "oft_diag", {}),
        ({"lambda_layer": (1, 2)}, "lambda_layer", {}),
        ({**GLORA, "dora_scale": (32, 1)}, "", {"given": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "dora_scale")}),
        ({"oft_blocks": (4, 8, 8), "dora_scale": (32, 1)}, "", {"given": ("dora_scale", "oft_blocks")}),
        ({**LOHA, "dora_scale": (1, 31)}, "", {"given": {**LOHA, "dora_scale": (1, 31)}}),
        ({**LORA, "dora_scale": (31, 1)}, "", {"given": {**LORA, "dora_scale": (31, 1)}}),
        ({**LOHA, "alpha": torch.tensor(0.0)}, "alpha", {"given": 0.0}),
        ({**LOKR, "alpha": torch.ones(2)}, "alpha", {"given": (2,)}),
        ({**LOHA, "hada_w2_b": (3, 32)}, "", {"given": {**LOHA, "hada_w2_b": (3, 32)}}),
        ({"hada_w1_a": (32, 2)}, "", {"given": {"hada_w1_a": (32, 2)}}),
        ({**LOHA, "hada_t1": (2, 2, 3, 3)}, "", {"given": {**LOHA, "hada_t1": (2, 2, 3, 3)}}),
        ({**LOKR, "lokr_w1": (4, 5)}, "", {"given": {**LOKR, "lokr_w1": (4, 5)}}),
        ({"lokr_w2": (8, 8)}, "", {"given": {"lokr_w2": (8, 8)}}),
        (
            {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8), "alpha": torch.tensor(1.0)},
            "",
            {"given": (1, 2)},
        ),
        ({"oft_blocks": (4, 8, 7)}, "", {"given": {"oft_blocks": (4, 8, 7)}}),
        ({"oft_blocks": (3, 8, 8)}, "", {"given": {"oft_blocks": (3, 8, 8)}}),
        ({"oft_blocks": (4, 8, 8), "alpha": torch.tensor(-1.0)}, "", {"given": [-1.0]}),
        ({"oft_blocks": (3, 4, 6, 6)}, "", {"given": {"oft_blocks": (3, 4, 6, 6)}}),
        ({**GLORA, "b2.weight": (3, 32)}, "", {"given": {**GLORA, "b2.weight": (3, 32)}}),
        ({**GLORA, "bm.weight": (2, 2, 3, 3)}, "bm.weight", {}),
        ({"weight": (31,), "on_input": torch.tensor(1)}, "", {"given": {"on_input": (), "weight": (31,)}}),
        ({"weight": (1, 31), "on_input": torch.tensor(0)}, "", {"given": {"on_input": (), "weight": (1, 31)}}),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, parts: dict[str, Any], part: str, data: dict[str, Any], strict: bool) -> None:
    pipe = tiny_pipeline("sd")
    with raises(LoadError, where=f"{Q}.{part}" if part else Q, **data):
        veneer.load(pipe, file(tmp_path, parts), strict=strict)
    assert veneer.attachments(pipe) == []


def test_what_is_unused_is_named(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    path = file(tmp_path, {**LOHA, "spare": (2,)})
    with raises(LoadError, unused=(f"{Q}.spare",)):
        veneer.load(pipe, path)
    report = veneer.load(pipe, path, strict=False).loaded
    assert report.unused == (f"{Q}.spare",)
    assert "no alpha: alpha = rank (1 of 1 modules)" in str(report)
    with raises(LoadError, unused=tuple(f"lora_unet_elsewhere.{end}" for end in sorted(LOHA))):
        veneer.load(tiny_pipeline("sd"), file(tmp_path, LOHA, "lora_unet_elsewhere"))


def test_sd_scripts_constraint_of_zero(tmp_path: Path) -> None:
    path = file(tmp_path, {"oft_blocks": (4, 8, 8), "alpha": torch.tensor(0.0)}, Q.replace("lora_", "oft_"))
    with raises(LoadError, where=Q.replace("lora_", "oft_"), given=0):
        veneer.load(tiny_pipeline("sd"), path)


def test_a_name_that_does_not_say_of_what(tmp_path: Path) -> None:
    path = file(tmp_path, {"hada_w1_a": (1, 1)}, "lycoris_text_model_encoder_layers_0_self_attn_q_proj")
    with raises(LoadError, given=("text_encoder", "text_encoder_2"), expected=1):
        veneer.load(tiny_pipeline("sdxl"), path)


def twice() -> list[veneer.Attachment]:
    pipe = tiny_pipeline("sd")
    return [attach(pipe, method, where="attn.q") for method in ("loha", "dora")]


def merged() -> veneer.Attachment:
    attachment = attach(tiny_pipeline("sd"), "dora", where="attn.q")
    attachment.merge()
    return attachment


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: [], {"given": 0, "expected": 1}),
        (lambda: attach(tiny_pipeline("sd"), "bitfit"), {"where": "bitfit", "given": "bitfit"}),
        (lambda: attach(tiny_pipeline("sd"), "loha", train="norm"), {"where": "loha", "expected": ()}),
        (twice, {"given": 2, "expected": 1}),
        (lambda: attach(tiny_pipeline("sd"), "oft"), {"given": "input", "expected": "output"}),
        (lambda: attach(tiny_pipeline("sd"), "boft", b=4), {"given": "input", "expected": "output"}),
        (lambda: attach(tiny_pipeline("sd"), "glora", where="attn.q"), {"given": ("low_rank", "low_rank")}),
        (lambda: attach(tiny_pipeline("sd"), "glora", where="bias.attn"), {"given": "UNet2DConditionModel"}),
        (lambda: attach(tiny_pipeline("sd"), "lora", where="text/embed.token"), {"given": "embedding"}),
        (merged, {"where": "dora", "given": "merged"}),
        (
            lambda: attach(timm.create_model("vit_tiny_patch16_224", depth=1), "glora", where="attn.q"),
            {"given": ("low_rank", "low_rank")},
        ),
    ],
    ids=["nothing", "method", "trained", "twice", "oft", "boft", "glora", "bias", "embedding", "merged", "timm"],
)
def test_what_the_layout_cannot_hold(tmp_path: Path, make: Callable[[], Any], data: dict[str, Any]) -> None:
    with raises(SaveError, **data):
        lycoris.save(make(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []

"""What LyCORIS' layout or veneer's methods cannot hold is refused with the reason, and nothing is left behind."""

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
from veneer.formats import lycoris
from veneer.injection import LoadError, SaveError, attach
from veneer.testing.pipelines import tiny_pipeline

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"  # 32 × 32
LORA = {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2)}
LOHA = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
LOKR = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}
GLORA = {"a1.weight": (32, 2), "a2.weight": (2, 32), "b1.weight": (32, 2), "b2.weight": (2, 32)}


def file(path: Path, parts: dict[str, Any], name: str = Q) -> Path:
    """A file of one module; shapes become ones."""
    tensors = {f"{name}.{end}": t if isinstance(t, Tensor) else torch.ones(t) for end, t in parts.items()}
    save_file(tensors, path / "x.safetensors")
    return path / "x.safetensors"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"diff": (32, 32)}, r"to_q\.diff' is full weights, which no method here holds"),
        ({**LORA, "diff_b": (32,)}, r"to_q\.diff_b' is full weights"),
        ({"w_norm": (32,), "b_norm": (32,)}, r"to_q\.[wb]_norm' is norms"),
        ({"oft_diag": (4, 8, 8)}, r"oft_diag' is OFT of an older LyCORIS"),
        ({"lambda_layer": (1, 2)}, r"is T-LoRA"),
        ({**GLORA, "dora_scale": (32, 1)}, r"dora_scale beside a1.weight, .*no method here has magnitudes around such a change"),
        ({"oft_blocks": (4, 8, 8), "dora_scale": (32, 1)}, r"dora_scale beside oft_blocks: "),
        ({**LOHA, "dora_scale": (1, 31)}, r"misshapen: .*expected dora_scale \(32, 1\)"),
        ({**LORA, "dora_scale": (31, 1)}, r"misshapen: .*expected dora_scale \(32, 1\)"),
        ({**LOHA, "alpha": torch.tensor(0.0)}, r"alpha' is 0"),
        ({**LOKR, "alpha": torch.ones(2)}, r"alpha' has shape \(2,\)"),
        ({**LOHA, "hada_w2_b": (3, 32)}, r"misshapen: .*factors of one rank"),
        ({"hada_w1_a": (32, 2)}, r"expected all of hada_w1_a, hada_w1_b"),
        ({**LOHA, "hada_t1": (2, 2, 3, 3)}, r"expected two cores"),
        ({**LOKR, "lokr_w1": (4, 5)}, r"expected factors whose sides multiply to the weight's"),
        ({"lokr_w2": (8, 8)}, r"expected lokr_w1, or lokr_w1_a and lokr_w1_b"),
        (
            {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8), "alpha": torch.tensor(1.0)},
            r"factors of rank 1 and 2, of which each tool divides alpha by another",
        ),
        ({"oft_blocks": (4, 8, 7)}, r"expected square blocks"),
        ({"oft_blocks": (3, 8, 8)}, r"expected blocks of 32 rows"),
        ({"oft_blocks": (4, 8, 8), "alpha": torch.tensor(-1.0)}, r"constraint \(alpha\) \[-1\.0\]"),
        ({"oft_blocks": (3, 4, 6, 6)}, r"expected a butterfly of 32 rows"),
        ({**GLORA, "b2.weight": (3, 32)}, r"expected \(32, r\), \(r, 32\)"),
        ({**GLORA, "bm.weight": (2, 2, 3, 3)}, r"GLoRA in a Tucker form"),
        ({"weight": (31,), "on_input": torch.tensor(1)}, r"expected weight \(32,\) for its inputs"),
        ({"weight": (1, 31), "on_input": torch.tensor(0)}, r"expected weight \(32,\) for its outputs"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, parts: dict[str, Any], message: str, strict: bool) -> None:
    pipe = tiny_pipeline("sd")
    with pytest.raises(LoadError, match=message):
        veneer.load(pipe, file(tmp_path, parts), strict=strict)
    assert veneer.attachments(pipe) == []


def test_what_is_unused_is_named(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    path = file(tmp_path, {**LOHA, "spare": (2,)})
    with pytest.raises(LoadError, match=rf"unused 1 of 5 tensors: {Q}\.spare"):
        veneer.load(pipe, path)
    report = veneer.load(pipe, path, strict=False).loaded
    assert report.unused == (f"{Q}.spare",)
    assert "no alpha: alpha = rank (1 of 1 modules)" in str(report)
    with pytest.raises(LoadError, match=r"unused 4 of 4 .*made for"):
        veneer.load(tiny_pipeline("sd"), file(tmp_path, LOHA, "lora_unet_elsewhere"))


def test_sd_scripts_constraint_of_nothing(tmp_path: Path) -> None:
    path = file(tmp_path, {"oft_blocks": (4, 8, 8), "alpha": torch.tensor(0.0)}, Q.replace("lora_", "oft_"))
    with pytest.raises(LoadError, match="of which sd-scripts make no change at all"):
        veneer.load(tiny_pipeline("sd"), path)


def test_a_name_that_does_not_say_of_what(tmp_path: Path) -> None:
    path = file(tmp_path, {"hada_w1_a": (1, 1)}, "lycoris_text_model_encoder_layers_0_self_attn_q_proj")
    with pytest.raises(LoadError, match="does not say of what, and text_encoder, text_encoder_2 have modules of these names"):
        veneer.load(tiny_pipeline("sdxl"), path)


def twice() -> list[veneer.Attachment]:
    pipe = tiny_pipeline("sd")
    return [attach(pipe, method, where="attn.q") for method in ("loha", "dora")]


def merged() -> veneer.Attachment:
    attachment = attach(tiny_pipeline("sd"), "dora", where="attn.q")
    attachment.merge()
    return attachment


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [], "no attachment"),
        (lambda: attach(tiny_pipeline("sd"), "bitfit"), r"'bitfit' is bitfit; LyCORIS' files hold boft, dora, glora.*native"),
        (lambda: attach(tiny_pipeline("sd"), "loha", train="norm"), r"has trained unet\..*no place.*native"),
        (twice, r"two attachments adapt 'lora_unet_down"),
        (lambda: attach(tiny_pipeline("sd"), "oft"), r"turns the inputs of its weight.*side='output'.*native"),
        (lambda: attach(tiny_pipeline("sd"), "boft", b=4), r"turns the inputs of its weight"),
        (lambda: attach(tiny_pipeline("sd"), "glora", where="attn.q"), r"low_rank, elementwise.*product='matrices'"),
        (lambda: attach(tiny_pipeline("sd"), "glora", where="bias.attn"), r"which the layout has no such names for"),
        (lambda: attach(tiny_pipeline("sd"), "lora", where="text/embed.token"), r"is an embedding"),
        (merged, r"'dora' is merged into the base"),
        (lambda: attach(timm.create_model("vit_tiny_patch16_224", depth=1), "glora", where="attn.q"), r"elementwise"),
    ],
    ids=["nothing", "method", "trained", "twice", "oft", "boft", "glora", "bias", "embedding", "merged", "timm"],
)
def test_what_the_layout_cannot_hold(tmp_path: Path, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SaveError, match=message):
        lycoris.save(make(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []

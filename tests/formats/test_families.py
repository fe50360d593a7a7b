"""The family of bases of a file, by the names and widths of the published models in each format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import veneer
from veneer.formats import formats
from veneer.formats._families import family_of
from veneer.formats._kohya_names import places
from veneer.formats._modules import paths
from veneer.injection import LoadError
from veneer.injection.towers import towers_of
from veneer.testing.pipelines import tiny_pipeline

from ..hosts import published

BASES = {
    "sd15": "Stable Diffusion 1", "sd21": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL", "sd3_medium": "Stable Diffusion 3",
    "flux_dev": "FLUX", "pixart_alpha": "PixArt", "dit_xl_2": "DiT",
}  # fmt: skip


def tower_of(base: str) -> Any:
    (tower,) = towers_of(published.build(base))
    return tower


def pairs(names: Iterable[tuple[str, Any]], ends: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    """Shapes of pairs of rank 1 under these names."""
    found: dict[str, tuple[int, ...]] = {}
    for name, site in names:
        found |= {f"{name}{ends[0]}": (1, *site.weight_shape[1:]), f"{name}{ends[1]}": (site.d_out, 1)}
    return found


@pytest.mark.parametrize("base", BASES)
def test_of_every_layout(base: str) -> None:
    """Of whole models, and of their attention alone, as most files are."""
    tower = tower_of(base)
    prefix = "unet" if "sd1" in base or base in ("sd21", "sdxl") else "transformer"
    own = [(f"{prefix}.{path}", site) for path, site in paths(tower).items()]
    bare = [(f"base_model.model.{path}", site) for path, site in paths(tower).items()]
    layouts = {
        "diffusers": pairs(own, (".lora_A.weight", ".lora_B.weight")),
        "peft_folder": pairs(bare, (".lora_A.weight", ".lora_B.weight")),
        "native": pairs(own, (":down", ":up")),
        "onetrainer": pairs([(f"lora_{n.replace('.', '_')}", s) for n, s in own], (".lora_down.weight", ".lora_up.weight")),
        "kohya": pairs([(p.names[0], p.sites[0]) for p in places(tower)], (".lora_down.weight", ".lora_up.weight")),
    }
    comfy = formats.get("comfyui")()
    layouts["comfyui"] = pairs([(p.names[0], p.sites[0]) for p in comfy.places(tower)], (".lora_down.weight", ".lora_up.weight"))
    for form, shapes in layouts.items():
        if not shapes:
            continue
        assert family_of(shapes, form) == BASES[base], form
        attention = {key: shape for key, shape in shapes.items() if "attn" in key}
        assert family_of(attention, form) == ("DiT or PixArt" if base == "dit_xl_2" else BASES[base]), form


def test_of_xlabs_and_old_diffusers_files() -> None:
    flux, sd = tower_of("flux_dev"), tower_of("sd15")
    named = [(p.names[0], p.sites[0]) for p in formats.get("xlabs")().places(flux)]
    assert family_of(pairs(named, (".down.weight", ".up.weight"))) == "FLUX"
    old = [(p.names[-1], p.sites[0]) for p in formats.get("diffusers_old")().readable(sd) if "processor" in p.names[-1]]
    assert family_of(pairs(old, (".down.weight", ".up.weight"))) == "Stable Diffusion 1"


def test_sdxl_without_its_cross_attention() -> None:
    """By the depth of its transformers; or by its second text encoder."""
    sites = paths(tower_of("sdxl"))
    own = [(f"unet.{path}", site) for path, site in sites.items() if "attn1" in path]
    assert family_of(pairs(own, (".lora_A.weight", ".lora_B.weight"))) == "Stable Diffusion XL"
    few = [(n, s) for n, s in own if "transformer_blocks.0" in n]
    assert family_of(pairs(few, (".lora_A.weight", ".lora_B.weight"))) is None
    second = {"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (1, 1280)}
    assert family_of(pairs(few, (".lora_A.weight", ".lora_B.weight")) | second) == "Stable Diffusion XL"


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        ({"emb_params": (5, 768)}, "Stable Diffusion 1"),
        ({"<toy>": (1024,)}, "Stable Diffusion 2"),
        ({"clip_l": (1, 768), "clip_g": (1, 1280)}, "Stable Diffusion XL or 3"),
        ({"clip_l": (1, 768), "t5": (1, 4096)}, "FLUX"),
        ({"<toy>": (1, 24)}, None),
    ],
)
def test_of_words(shapes: dict[str, tuple[int, ...]], family: str | None) -> None:
    assert family_of(shapes, "embeddings") == family


FOREIGN = {
    "lora_unet_blocks_0_self_attn_q": "Wan", "lora_unet_double_blocks_0_img_mlp_fc1": "HunyuanVideo",
    "lora_unet_transformer_blocks_0_img_mod_1": "Qwen-Image",
    "diffusion_model.double_stream_blocks.0.block.attn1.to_q": "HiDream",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_families_that_are_not_known_here_are_named(tmp_path: Path, name: str) -> None:
    """musubi-tuner and others use kohya's layout for them."""
    ends = ("lora_down.weight", "lora_up.weight")
    save_file({f"{name}.{end}": torch.ones(2, 2) for end in ends}, tmp_path / "x.safetensors")
    with pytest.raises(LoadError, match=rf"unused 2 of 2.*It is for {FOREIGN[name]}, a family that is not known here\."):
        veneer.load(tiny_pipeline("flux"), tmp_path / "x")


def test_the_error_says_which_family_it_is_for(tmp_path: Path) -> None:
    save_file({"lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(LoadError, match=r"It is for Stable Diffusion 3\.$"):
        veneer.load(tiny_pipeline("flux"), tmp_path / "x")

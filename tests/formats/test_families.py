"""The family of bases of a file, by the names and widths of the published models in each format."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import veneer
from tests.hosts import published
from tests.raising import raises
from veneer import base_models
from veneer.base_models.skeletons.transformer_configs import TRANSFORMERS
from veneer.formats import formats, read
from veneer.formats._core.families import architecture_of, family_of
from veneer.formats._names.kohya import named_layers
from veneer.formats._names.modules import weight_paths
from veneer.injection import LoadError
from veneer.injection.towers import towers_of
from veneer.testing.pipelines import tiny_pipeline

BASES = {
    "sd15": "Stable Diffusion 1", "sd21": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL", "sd3_medium": "Stable Diffusion 3",
    "flux_dev": "FLUX", "pixart_alpha": "PixArt", "dit_xl_2": "DiT",
}  # fmt: skip


# what else has attention of these names and widths
ATTENTION = {
    "flux_dev": "FLUX, Chroma, Bria or LongCat", "pixart_alpha": "PixArt or Sana", "dit_xl_2": "DiT, PixArt or Sana",
}  # fmt: skip
# diffusers' classes, with the family of a LoRA of all layers, of attention, of queries alone and of feed-forward layers
CLASSES: dict[str, tuple[dict[str, Any], tuple[str | None, ...]]] = {
    "ChromaTransformer2DModel": ({}, ("Chroma", *["FLUX, Chroma, Bria or LongCat"] * 3)),
    "Flux2Transformer2DModel": ({}, ("FLUX.2",) * 4),
    "QwenImageTransformer2DModel": ({}, ("Qwen-Image", "Qwen-Image", "Qwen-Image", None)),
    "HunyuanVideoTransformer3DModel": ({}, ("HunyuanVideo",) * 4),
    "HunyuanVideo15Transformer3DModel": ({}, ("HunyuanVideo 1.5",) * 4),
    "HunyuanImageTransformer2DModel": ({}, ("HunyuanImage",) * 4),
    "AuraFlowTransformer2DModel": ({"pos_embed_max_size": 9216}, ("AuraFlow",) * 4),
    "LTXVideoTransformer3DModel": ({}, ("LTX", "LTX", "LTX", None)),
    "LTX2VideoTransformer3DModel": ({}, ("LTX-2", "LTX-2", "LTX-2", None)),
    "SanaTransformer2DModel": ({}, ("Sana",) * 4),
    "Krea2Transformer2DModel": ({}, ("Krea 2",) * 4),
    "CosmosTransformer3DModel": ({}, ("Cosmos", "Cosmos", None, None)),
    "MochiTransformer3DModel": ({}, (None,) * 4),
    "CogVideoXTransformer3DModel": ({}, (None,) * 4),
    "BriaTransformer2DModel": ({}, ("FLUX, Bria or LongCat", *["FLUX, Chroma, Bria or LongCat"] * 3)),
}


def tower_of(base: str) -> Any:
    (tower,) = towers_of(published.build(base))
    return tower


def pairs(names: Iterable[tuple[str, Any]], ends: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    """Shapes of LoRA factors of rank 1 under these names."""
    found: dict[str, tuple[int, ...]] = {}
    for name, site in names:
        found |= {f"{name}{ends[0]}": (1, *site.weight_shape[1:]), f"{name}{ends[1]}": (site.d_out, 1)}
    return found


@pytest.mark.parametrize("base", BASES)
def test_of_every_layout(base: str) -> None:
    """Of whole models, and of their attention alone, as most files are."""
    tower = tower_of(base)
    prefix = "unet" if "sd1" in base or base in ("sd21", "sdxl") else "transformer"
    own = [(f"{prefix}.{path}", site) for path, site in weight_paths(tower).items()]
    bare = [(f"base_model.model.{path}", site) for path, site in weight_paths(tower).items()]
    layouts = {
        "diffusers": pairs(own, (".lora_A.weight", ".lora_B.weight")),
        "peft_folder": pairs(bare, (".lora_A.weight", ".lora_B.weight")),
        "native": pairs(own, (":down", ":up")),
        "onetrainer": pairs([(f"lora_{n.replace('.', '_')}", s) for n, s in own], (".lora_down.weight", ".lora_up.weight")),
        "kohya": pairs([(p.names[0], p.sites[0]) for p in named_layers(tower)], (".lora_down.weight", ".lora_up.weight")),
    }
    comfy = formats.get("comfyui")()
    layouts["comfyui"] = pairs([(p.names[0], p.sites[0]) for p in comfy.places(tower)], (".lora_down.weight", ".lora_up.weight"))
    for form, shapes in layouts.items():
        if not shapes:
            continue
        assert family_of(shapes, form) == BASES[base], form
        attention = {key: shape for key, shape in shapes.items() if "attn" in key}
        several = ATTENTION.get(base, BASES[base])
        if base == "flux_dev" and form in ("kohya", "comfyui"):
            several = "FLUX or Chroma"
        assert family_of(attention, form) == several, form


@pytest.mark.parametrize("name", CLASSES)
def test_of_transformers_that_no_host_knows(name: str) -> None:
    """By the names and widths of diffusers' own classes: no family where several have them."""
    options, families = CLASSES[name]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = getattr(diffusers, name)(**options)
    found = {path: m.weight.shape for path, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    for part, family in zip(("", "attn", "to_q", ".ff"), families, strict=True):
        for pattern in ("transformer.{}.lora_A.weight", "lora_transformer_{}.lora_down.weight"):
            chosen = {path: shape for path, shape in found.items() if part in path}
            flat = {p: p.replace(".", "_") if pattern.startswith("lora") else p for p in chosen}
            shapes = {pattern.format(flat[path]): (1, shape[1]) for path, shape in chosen.items()}
            assert family_of(shapes) == family, (part, pattern)


@pytest.mark.parametrize("name", ["flux", "chroma", *TRANSFORMERS])
def test_architectures_of_every_layout(name: str) -> None:
    """Of whole models, and of attention alone; only Chroma's attention is also FLUX.1's."""
    (tower,) = towers_of(base_models.architecture(name).components["transformer"])
    own = [(f"transformer.{path}", site.d_out, site) for path, site in weight_paths(tower).items()]
    comfy = [(p.names[0], sum(s.d_out for s in p.sites), p.sites[0]) for p in formats.get("comfyui")().places(tower)]
    kohya = [(p.names[0], sum(s.d_out for s in p.sites), p.sites[0]) for p in named_layers(tower)]
    for layers in filter(None, (own, comfy, kohya)):
        shapes = {f"{key}.lora_down.weight": (1, *site.weight_shape[1:]) for key, _, site in layers}
        shapes |= {f"{key}.lora_up.weight": (rows, 1) for key, rows, _ in layers}
        assert architecture_of(shapes) == name
        attention = {key: shape for key, shape in shapes.items() if "att" in key and "refiner" not in key}
        assert architecture_of(attention) == ("flux" if name == "chroma" else name)


@pytest.mark.parametrize(("rows", "family"), [(27648, "FLUX.2"), (21504, "FLUX, Chroma or HunyuanVideo")])
def test_gated_feed_forwards_tell_flux2_from_flux(rows: int, family: str) -> None:
    """A file of a few blocks: the rows of queries, keys, values and the feed-forward's input, at the width of both."""
    name = "lora_unet_single_blocks_3_linear1"
    assert family_of({f"{name}.lora_down.weight": (1, 3072), f"{name}.lora_up.weight": (rows, 1)}) == family


@pytest.mark.parametrize(("rows", "family"), [(1536, "Krea 2"), (6144, "FLUX.2"), (None, "FLUX.2 or Krea 2")])
def test_keys_of_fewer_heads_tell_krea2_from_flux2(rows: int | None, family: str) -> None:
    """A file of queries, or of queries and keys, of the blocks of images: both have the same names and input width."""
    shapes = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 6144)}
    if rows:
        name = "transformer.transformer_blocks.0.attn.to_k"
        shapes |= {f"{name}.lora_A.weight": (4, 6144), f"{name}.lora_B.weight": (rows, 4)}
    assert family_of(shapes) == family
    name = {"Krea 2": "krea-2", "FLUX.2": "flux2"}.get(family)
    assert architecture_of(shapes) == name
    assert architecture_of(shapes, model_spec="Krea-2/lora") == (name or "krea-2")


def test_metadata_decides_between_architectures_that_fit() -> None:
    shapes = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (1, 3072)}
    assert architecture_of(shapes) == "flux"
    assert architecture_of(shapes, model_spec="chroma/lora") == "chroma"
    assert architecture_of(shapes, model_spec="hunyuan-video/lora") == "hunyuan-video"
    assert architecture_of(shapes, model_spec="z-image/lora") == "flux"


def test_names_of_hunyuan_video_and_flux_are_alike_but_for_their_number() -> None:
    def attention(blocks: int, single: int, width: int = 3072) -> dict[str, tuple[int, ...]]:
        names = [f"lora_unet_double_blocks_{i}_img_attn_qkv" for i in range(blocks)]
        names += [f"lora_unet_single_blocks_{i}_linear1" for i in range(single)]
        return {f"{name}.lora_down.weight": (4, width) for name in names}

    assert family_of(attention(19, 38)) == "FLUX or Chroma"
    assert family_of(attention(20, 40)) == "HunyuanVideo"
    assert family_of(attention(10, 30)) == "FLUX, Chroma or HunyuanVideo"
    assert family_of(attention(19, 38, 64)) is None


@pytest.mark.parametrize("method", ["lora", "loha"])
def test_small_models_have_no_family(method: str, tmp_path: Path) -> None:
    """The names of SDXL, FLUX and PixArt at widths that these do not have."""
    for family in ("sdxl", "flux", "pixart", "dit", "sd"):
        for form in ("native", "diffusers" if method == "lora" else "lycoris"):
            path = formats.get(form)().save(veneer.attach(tiny_pipeline(family), method, rank=1), tmp_path / form)
            assert family_of(read(path).shapes, form) is None, (family, form)


def test_a_controlnet_of_the_bundled_base_is_no_sdxl(tmp_path: Path) -> None:
    """It has an embedding of sizes, which SDXL has as well, and reads text of another width."""
    shapes = {
        "add_embedding.linear_1.weight": (1024, 512),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (256, 256),
    }
    assert family_of(shapes, "controlnet") is None
    without_text = {"add_embedding.linear_1.weight": (1280, 2816)}
    assert family_of(without_text, "controlnet") == "Stable Diffusion XL"
    del shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    assert family_of(shapes, "controlnet") is None


def test_of_xlabs_and_old_diffusers_files() -> None:
    flux, sd = tower_of("flux_dev"), tower_of("sd15")
    named = [(p.names[0], p.sites[0]) for p in formats.get("xlabs")().places(flux)]
    assert family_of(pairs(named, (".down.weight", ".up.weight"))) == "FLUX"
    old = [(p.names[-1], p.sites[0]) for p in formats.get("diffusers_old")().readable(sd) if "processor" in p.names[-1]]
    assert family_of(pairs(old, (".down.weight", ".up.weight"))) == "Stable Diffusion 1"


def test_sdxl_without_its_cross_attention() -> None:
    """By the depth of its transformers; or by its second text encoder."""
    sites = weight_paths(tower_of("sdxl"))
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
def test_token_embeddings(shapes: dict[str, tuple[int, ...]], family: str | None) -> None:
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
    with raises(LoadError, unused=tuple(f"{name}.{end}" for end in ends), family=FOREIGN[name]):
        veneer.load(tiny_pipeline("flux"), tmp_path / "x")


def test_the_error_says_which_family_it_is_for(tmp_path: Path) -> None:
    save_file({"lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with raises(LoadError, family="Stable Diffusion 3"):
        veneer.load(tiny_pipeline("flux"), tmp_path / "x")

"""Original names against diffusers' converters of whole original checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from torch import Tensor

from tests.hosts import published
from veneer.base_models import architecture
from veneer.formats._names.modules import original_modules, original_names, weight_paths
from veneer.injection.towers import towers_of


def tower_of(name: str) -> Any:
    (tower,) = towers_of(published.build(name))
    return tower


def coded(tower: Any) -> dict[str, Tensor]:
    """A checkpoint with original names whose weights have one column, with a different value in each row."""
    state, start = {}, 0
    for module in original_modules(tower):
        rows = sum(site.d_out for site in module.sites)
        state[f"{module.path}.weight"] = torch.arange(start, start + rows, dtype=torch.float64)[:, None]
        state[f"{module.path}.bias"] = torch.zeros(rows)
        start += rows
    return state


def rows_of(tower: Any) -> dict[str, Tensor]:
    """Path of each weight to its rows of `coded`."""
    found, state = {}, coded(tower)
    for module in original_modules(tower):
        weight = state[f"{module.path}.weight"]
        whole = torch.cat(weight.chunk(2)[::-1]) if module.swapped else weight
        parts = whole.split([site.d_out for site in module.sites])
        found |= {site.name: part for site, part in zip(module.sites, parts, strict=True)}
    return found


def assert_as(theirs: dict[str, Tensor], tower: Any) -> None:
    want = rows_of(tower)
    assert want.keys() == weight_paths(tower).keys()
    for name, rows in want.items():
        assert torch.equal(theirs[f"{name}.weight"], rows), name


@pytest.mark.parametrize("name", ["sd3", "sd35", "sd35-large"])
def test_sd3(name: str) -> None:
    (tower, *_) = towers_of(architecture(name).components["transformer"])
    state = coded(tower) | {"pos_embed": torch.zeros(1, 1, 1)}
    # only that is read of the width
    state["context_embedder.weight"] = state["context_embedder.weight"].expand(-1, 4096)
    theirs = converters.convert_sd3_transformer_checkpoint_to_diffusers(state)
    theirs["context_embedder.weight"] = theirs["context_embedder.weight"][:, :1]
    assert_as(theirs, tower)


def test_flux() -> None:
    tower = tower_of("flux_dev")
    state = coded(tower)
    for i in range(19):
        norms = [
            f"double_blocks.{i}.{stream}_attn.norm.{half}_norm.scale" for stream in ("img", "txt") for half in ("query", "key")
        ]
        state |= {name: torch.zeros(1) for name in norms}
    state |= {f"single_blocks.{i}.norm.{half}_norm.scale": torch.zeros(1) for i in range(38) for half in ("query", "key")}
    assert_as(converters.convert_flux_transformer_checkpoint_to_diffusers(state), tower)


def chroma_norms() -> dict[str, Tensor]:
    halves, names = ("query", "key"), [f"distilled_guidance_layer.norms.{i}.scale" for i in range(5)]
    names += [
        f"double_blocks.{i}.{stream}_attn.norm.{half}_norm.scale"
        for i in range(19)
        for stream in ("img", "txt")
        for half in halves
    ]
    names += [f"single_blocks.{i}.norm.{half}_norm.scale" for i in range(38) for half in halves]
    return {name: torch.zeros(1) for name in names}


def sana_others() -> dict[str, Tensor]:
    """Tensors without LoRA, which the converter expects: tables, norms, and the grouped convolution."""
    names = ["pos_embed", "y_embedder.y_embedding", "attention_y_norm.weight", "final_layer.scale_shift_table"]
    blocks = ("scale_shift_table", "mlp.depth_conv.conv.weight", "mlp.depth_conv.conv.bias")
    return {name: torch.zeros(1) for name in [*names, *(f"blocks.{i}.{end}" for i in range(20) for end in blocks)]}


CONVERTERS: dict[str, tuple[Any, Any]] = {
    "flux2-klein-4b": (converters.convert_flux2_transformer_checkpoint_to_diffusers, dict),
    "z-image": (converters.convert_z_image_transformer_checkpoint_to_diffusers, dict),
    "chroma": (converters.convert_chroma_transformer_checkpoint_to_diffusers, chroma_norms),
    "lumina2": (converters.convert_lumina2_to_diffusers, dict),
    "wan-14b-i2v": (converters.convert_wan_transformer_to_diffusers, dict),
    "hunyuan-video": (converters.convert_hunyuan_video_transformer_to_diffusers, dict),
    "krea-2": (converters.convert_krea2_transformer_checkpoint_to_diffusers, dict),
    "sana": (converters.convert_sana_transformer_to_diffusers, sana_others),
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_transformers(name: str) -> None:
    """Every weight at the published sizes; HunyuanVideo in its own spelling, which is not ComfyUI's."""
    convert, others = CONVERTERS[name]
    (tower,) = towers_of(architecture(name).components["transformer"])
    spellings = {m.path: m.spellings[0] for m in original_modules(tower) if m.spellings}
    state = {key.replace(path := key.rpartition(".")[0], spellings.get(path, path)): t for key, t in coded(tower).items()}
    assert_as(convert(state | others()), tower)


@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl"])
def test_unets(base: str) -> None:
    tower = tower_of(base)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in coded(tower).items()}
    theirs = converters.convert_ldm_unet_checkpoint(state, {**tower.module.config})
    assert_as(theirs, tower)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_every_tensor_of_a_unet(base: str) -> None:
    """Norms and biases as well."""
    model = tower_of(base).module
    names = original_names(model, list(model.state_dict()))
    state = {f"model.diffusion_model.{first}": torch.tensor(i) for i, first in enumerate(names.values())}
    theirs = converters.convert_ldm_unet_checkpoint(state, {**model.config})
    assert {name: int(i) for name, i in theirs.items()} == {name: i for i, name in enumerate(names)}


def test_pixart_has_a_name_for_every_weight() -> None:
    """Names as in PixArt's own checkpoints; shapes show that no weight is confused with another."""
    tower = tower_of("pixart_alpha")
    named = {module.path: module for module in original_modules(tower)}
    assert {site.name for module in named.values() for site in module.sites} == weight_paths(tower).keys()
    shapes = {
        "blocks.27.attn.qkv": (3456, 1152), "blocks.0.cross_attn.q_linear": (1152, 1152),
        "blocks.0.cross_attn.kv_linear": (2304, 1152), "blocks.3.mlp.fc1": (4608, 1152), "blocks.3.mlp.fc2": (1152, 4608),
        "t_block.1": (6912, 1152), "t_embedder.mlp.0": (1152, 256), "y_embedder.y_proj.fc1": (1152, 4096),
        "x_embedder.proj": (1152, 4), "final_layer.linear": (32, 1152), "csize_embedder.mlp.0": (384, 256),
    }  # fmt: skip
    assert {n: (sum(s.d_out for s in named[n].sites), named[n].sites[0].d_in) for n in shapes} == shapes

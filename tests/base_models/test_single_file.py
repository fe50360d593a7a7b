"""Base models in a single safetensors file: loaded as from a folder, and what else a file may be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

import veneer
from tests.raising import raises
from veneer import base_models
from veneer.base_models.single_file import _write_configs
from veneer.formats._names.modules import original_names
from veneer.testing.pipelines import tiny_pipeline

VAE = (
    (r"(en|de)coder\.(?:down|up)_blocks", r"\1coder.blocks"), (r"resnets\.(\d+)", r"block.\1"),
    (r"(?:down|up)samplers\.0\.", "sample."), (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.block\.0", "mid.block_1"), (r"mid_block\.block\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"), (r"to_out\.0", "proj_out"), (r"to_([qkv])", r"\1"),
)  # fmt: skip
"""The autoencoder's names in diffusers and in the original code, except for the numbers of levels."""


def original_vae(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The tensors of a VAE as in the original code: it counts the decoder's levels from the output; attention is convolutions."""
    found = {}
    for key, tensor in state.items():
        name = key
        for pattern, new in VAE:
            name = re.sub(pattern, new, name)
        if m := re.match(r"(en|de)coder\.blocks\.(\d+)\.(.*)", name):
            side, level = ("down", int(m[2])) if m[1] == "en" else ("up", levels - 1 - int(m[2]))
            name = f"{m[1]}coder.{side}.{level}.{m[3].replace('sample.', f'{side}sample.')}"
        if re.search(r"attn_1\.(?:[qkv]|proj_out)\.weight", name):
            tensor = tensor[:, :, None, None]
        found[name] = tensor
    return found


OPEN_CLIP = (
    (r"(?:text_model\.)?encoder\.layers\.", "transformer.resblocks."), (r"layer_norm(\d)", r"ln_\1"), (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"), (r"self_attn\.out_proj", "attn.out_proj"), (r"(?:text_model\.)?final_layer_norm", "ln_final"),
    (r"(?:text_model\.)?embeddings\.token_embedding", "token_embedding"),
    (r"(?:text_model\.)?embeddings\.position_embedding\.weight", "positional_embedding"),
)  # fmt: skip
"""The names of a CLIP text encoder in transformers and in open_clip, which fuses q, k and v."""


def open_clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the text encoder of SDXL that comes from open_clip, as there."""
    tensors = {}
    for key, tensor in state.items():
        name = key
        for pattern, new in OPEN_CLIP:
            name = re.sub(pattern, new, name)
        tensors[name] = tensor
    for name in [n for n in tensors if ".self_attn.q_proj." in n]:
        start, kind = name.split(".self_attn.q_proj.")
        fused = [tensors.pop(f"{start}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
        tensors[f"{start}.attn.in_proj_{kind}"] = torch.cat(fused)
    tensors["text_projection"] = tensors.pop("text_projection.weight").T
    return tensors


def single_file(pipe: Any, path: Path) -> Path:
    """A pipeline of Stable Diffusion 1.x or XL as one file in the layout of the original code."""
    unet, text = pipe.unet.state_dict(), pipe.text_encoder.state_dict()
    names = original_names(pipe.unet, list(unet))
    tensors = {f"model.diffusion_model.{names[key]}": tensor for key, tensor in unet.items()}
    levels = len(pipe.vae.config.block_out_channels)
    tensors |= {f"first_stage_model.{key}": t for key, t in original_vae(pipe.vae.state_dict(), levels).items()}
    prefix = "" if next(iter(text)).startswith("text_model.") else "text_model."
    xl = hasattr(pipe, "text_encoder_2")
    start = "conditioner.embedders.0.transformer" if xl else "cond_stage_model.transformer"
    tensors |= {f"{start}.{prefix}{key}": tensor for key, tensor in text.items()}
    if xl:
        second = open_clip_names(pipe.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in second.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A tiny pipeline, its folder, and its single file."""
    return pipeline_and_files("sd", tmp_path_factory)


def pipeline_and_files(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    pipe, folder = tiny_pipeline(family), tmp_path_factory.mktemp("single")
    pipe.save_pretrained(folder / "folder")
    return pipe, folder / "folder", single_file(pipe, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_single_file_is_loaded_as_the_folder_is(family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pipe, folder, file = pipeline_and_files(family, tmp_path_factory)
    loaded = base_models.load(file, config=folder)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])):
        expected = getattr(pipe, part).state_dict()
        got = getattr(loaded, part).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items()), part
    images = []
    for each in (base_models.load(folder), loaded):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(each("a cat", num_inference_steps=2, generator=generator, output_type="np").images)
    assert (images[0] == images[1]).all()
    adapter = veneer.attach(base_models.load(folder), "lora", rank=2).save(tmp_path / "adapter")
    assert veneer.load(loaded, adapter).loaded.clean, "the same fingerprint"


@pytest.mark.parametrize(
    "missing",
    [
        "cond_stage_model",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_out.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
    ],
)
def test_an_incomplete_file_is_an_error(made: tuple[Any, Path, Path], tmp_path: Path, missing: str) -> None:
    _, folder, file = made
    tensors = load_file(file)
    partial = {key: tensor for key, tensor in tensors.items() if not key.startswith(missing)}
    assert len(partial) < len(tensors)
    save_file(partial, tmp_path / "partial.safetensors")
    with raises(base_models.BaseModelError, where="tensors", expected="StableDiffusionPipeline"):
        base_models.load(tmp_path / "partial.safetensors", config=folder)


def test_a_deeper_unet_is_another_model(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, folder, file = made
    tensors = load_file(file)
    more = {"model.diffusion_model.output_blocks.9.0.in_layers.0.bias": torch.zeros(16)}
    save_file({**tensors, **more}, tmp_path / "deeper.safetensors")
    unet = sum(key.startswith("model.diffusion_model.") for key in tensors)
    with raises(base_models.BaseModelError, where="unet", given=unet + 1, expected=unet):
        base_models.load(tmp_path / "deeper.safetensors", config=folder)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with raises(base_models.BaseModelError, where="base", file="models/sdxl.safetensors"):
        base_models.load("models/sdxl.safetensors")


def test_presets_and_forms_reject_other_files_before_loading(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("root")
    with raises(base_models.BaseModelError, where="kind", file=tmp_path / "passwd", expected=".safetensors"):
        base_models.preset(tmp_path / "passwd")


def test_other_files_are_errors(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    lora = veneer.attach(made[0], "lora", rank=2)
    adapter = lora.save(tmp_path / "lora")
    lora.detach()
    with raises(base_models.BaseModelError, where="kind", file=adapter, expected=("sd15", "sdxl")):
        base_models.load(adapter)
    for name in ("model.ckpt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"no tensors")
        with raises(base_models.BaseModelError, where="kind", file=tmp_path / name, expected=".safetensors"):
            base_models.load(tmp_path / name)


@pytest.mark.parametrize(("name", "parts"), [("sd15", ["text_encoder"]), ("sdxl", ["text_encoder", "text_encoder_2"])])
def test_configs_are_complete(name: str, parts: list[str], tmp_path: Path) -> None:
    """diffusers builds a scheduler and tokenizers from them; a file with `v_pred` and `ztsnr` predicts v at zero terminal SNR."""
    shapes = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3), "v_pred": (), "ztsnr": ()}
    folder = _write_configs(tmp_path, name, shapes)
    index = json.loads((folder / "model_index.json").read_text())
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    assert not scheduler.config.clip_sample
    pads = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
    for part in parts:
        name = part.replace("text_encoder", "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(folder / name)
        assert (len(tokenizer), tokenizer.pad_token, tokenizer.model_max_length) == (49408, pads[name], 77)

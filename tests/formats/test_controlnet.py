"""ControlNets of diffusers' class and with the original names: equal outputs, and equal tensors when saved again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats.guides import REAL, assert_close, form, guided, inputs, output, paper, picture, real, tiny, trained
from tests.raising import raises
from veneer.formats import Options, controlnet, convert, inspect, read
from veneer.formats._names.ldm import ldm_names
from veneer.injection import LoadError, SaveError
from veneer.testing.pipelines import tiny_pipeline

NAME = "diffusion_pytorch_model.safetensors"
PASSED = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs")


def net(kind: str, **options: Any) -> Any:
    made: Any = ControlNetModel.from_unet(tiny(kind), **options)
    return trained(made)


@torch.no_grad()
def by_diffusers(unet: Any, made: Any, image: Tensor) -> Tensor:
    call = {name: value for name, value in inputs(unet).items() if name in PASSED}
    skips, middle = made(**call, controlnet_cond=image, return_dict=False)
    return output(unet, down_block_additional_residuals=skips, mid_block_additional_residual=middle)


def saved(made: Any, folder: Path, **options: Any) -> Path:
    made.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_folder_of_diffusers_round_trip(kind: str, tmp_path: Path) -> None:
    unet, made = tiny(kind), net(kind)
    attachment = veneer.load(unet, saved(made, tmp_path / "a"))
    assert attachment.loaded.clean
    assert attachment.name == "controlnet"
    changed = guided(unet, attachment, image=picture())
    assert (changed - output(tiny(kind))).abs().max() > 1e-3
    assert_close(changed, by_diffusers(tiny(kind), made, picture()))
    written = controlnet.save(attachment, tmp_path / "b.safetensors")
    assert written == tmp_path / "b" / NAME
    before, after = load_file(tmp_path / "a" / NAME), load_file(written)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_ours_is_a_folder_for_diffusers(tmp_path: Path) -> None:
    unet = tiny("sd1")
    attachment = trained(veneer.attach(unet, "controlnet", channels=1, hint=(4, 8, 8, 12)))
    controlnet.save(attachment, tmp_path / "a")
    read_: Any = ControlNetModel.from_pretrained(tmp_path / "a")
    found = by_diffusers(tiny("sd1"), read_, picture(1))
    assert_close(found, guided(unet, attachment, image=picture(1)))
    again = veneer.load(tiny("sd1"), tmp_path / "a")
    assert (again.method.channels, again.method.hint) == (1, (4, 8, 8, 12))


def test_on_a_pipeline_of_fewer_pixels_a_latent(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    made: Any = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 12))
    attachment = veneer.load(pipe, saved(trained(made), tmp_path / "a"))
    assert attachment.loaded.clean
    assert list(attachment.parts) == ["unet.residuals"]
    with raises(LoadError, option="hint", given=4, expected=3):
        veneer.load(pipe, saved(ControlNetModel.from_unet(pipe.unet), tmp_path / "b"))
    assert veneer.attachments(pipe) == [attachment]


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_original_names(prefix: str, tmp_path: Path) -> None:
    made, unet = net("sd1"), tiny("sd1")
    state = made.state_dict()
    ldm = {prefix + theirs: state[name] for name, theirs in ldm_names(state).items()}
    converted = convert_controlnet_checkpoint(ldm, made.config)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[k], state[k]) for k in state)
    save_file(ldm, tmp_path / "x.safetensors")
    attachment = veneer.load(unet, tmp_path / "x")
    assert attachment.loaded.clean
    assert_close(guided(unet, attachment, image=picture()), by_diffusers(tiny("sd1"), made, picture()))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_original_names_at_real_widths(kind: str) -> None:
    with torch.device("meta"):
        unet = real(kind)
        known: Any = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    state = known.state_dict()
    names = ldm_names(state)
    more = {"label_emb.0.2.weight": "add_embedding.linear_2.weight"} if kind == "sdxl" else {}
    for theirs, ours in {
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.0.skip_connection.bias": "down_blocks.1.resnets.0.conv_shortcut.bias",
        "input_blocks.5.1.transformer_blocks.0.ff.net.2.bias": "down_blocks.1.attentions.1.transformer_blocks.0.ff.net.2.bias",
        "middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
        "middle_block.2.out_layers.3.bias": "mid_block.resnets.1.conv2.bias",
        "input_hint_block.12.weight": "controlnet_cond_embedding.blocks.5.weight",
        "input_hint_block.14.weight": "controlnet_cond_embedding.conv_out.weight",
        "zero_convs.8.0.weight": "controlnet_down_blocks.8.weight",
        "middle_block_out.0.weight": "controlnet_mid_block.weight",
        "time_embed.2.bias": "time_embedding.linear_2.bias",
        **more,
    }.items():  # fmt: skip
        assert names[ours] == theirs
    assert len(set(names.values())) == len(state)
    converted = convert_controlnet_checkpoint({theirs: state[name] for name, theirs in names.items()}, known.config)
    left = {key for key in state if "add_embedding" in key}  # diffusers' converter leaves them out
    assert converted.keys() == state.keys() - left


def test_one_file_and_half_precision(tmp_path: Path) -> None:
    made = net("sd1").half()
    saved(made, tmp_path / "a", variant="fp16")
    attachment = veneer.load(tiny("sd1"), tmp_path / "a")
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    state = made.state_dict()
    ((_, adapter),) = attachment.parts.values()
    assert all(torch.equal(t, state[k].float()) for k, t in adapter.net.state_dict().items())
    saved(net("sd1", conditioning_channels=1), tmp_path / "a")
    assert veneer.load(tiny("sd1"), tmp_path / "a").method.channels == 1, "the whole precision, where both are there"
    save_file(state, tmp_path / "b.safetensors")
    assert veneer.load(tiny("sd1"), tmp_path / "b").loaded.clean


def test_blue_green_red(tmp_path: Path) -> None:
    made = net("sd1", controlnet_conditioning_channel_order="bgr")
    unet = tiny("sd1")
    attachment = veneer.load(unet, saved(made, tmp_path / "a"))
    assert "BGR" in attachment.loaded.notes[0]
    assert_close(guided(unet, attachment, image=picture()), by_diffusers(tiny("sd1"), made, picture()))
    controlnet.save(attachment, tmp_path / "b")
    read_: Any = ControlNetModel.from_pretrained(tmp_path / "b")
    assert_close(by_diffusers(tiny("sd1"), read_, picture()), by_diffusers(tiny("sd1"), made, picture()))


@pytest.mark.parametrize(
    ("entry", "value", "expected"),
    [
        ("_class_name", "ControlNetUnionModel", "ControlNetModel"),
        ("global_pool_conditions", True, None),
        ("controlnet_conditioning_channel_order", "grb", ("rgb", "bgr")),
        ("norm_num_groups", 2, 4),
        ("attention_head_dim", [2, 4, 2], 2),
        ("layers_per_block", True, 1),
        ("only_cross_attention", [0, 0, 0], False),
    ],
)
def test_what_only_the_config_says(entry: str, value: Any, expected: Any, tmp_path: Path) -> None:
    path = saved(net("sd1"), tmp_path / "a") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    unet = tiny("sd1")
    with raises(LoadError, file=str(path), given=value, expected=expected) as caught:
        veneer.load(unet, tmp_path / "a")
    assert entry in (caught.value.option, caught.value.where)
    assert veneer.attachments(unet) == []


@pytest.mark.parametrize("kind", ["folder", "nowhere", "pipe"])
def test_a_config_that_is_no_file(kind: str, tmp_path: Path) -> None:
    path = saved(net("sd1", controlnet_conditioning_channel_order="bgr"), tmp_path / "a") / "config.json"
    path.unlink()
    {"folder": path.mkdir, "nowhere": lambda: path.symlink_to("gone"), "pipe": lambda: os.mkfifo(path)}[kind]()
    unet = tiny("sd1")
    with raises(LoadError, file=str(path), expected="file"):
        veneer.load(unet, tmp_path / "a")
    assert veneer.attachments(unet) == []


def test_another_family() -> None:
    with torch.device("meta"):
        other: Any = ControlNetModel.from_unet(real("sdxl"), load_weights_from_unet=False)
    file, unet = paper(other.state_dict()), real("sd1")
    with raises(LoadError, family="Stable Diffusion XL") as caught:
        controlnet.ControlNet().load(unet, file, Options())
    assert any(key.startswith("down_blocks.0.attentions.0") for key in caught.value.missing)
    assert caught.value.misshapen
    assert REAL["sd1"]["cross_attention_dim"] == 768
    assert veneer.attachments(unet) == []


def test_missing_unused_and_misshapen(tmp_path: Path) -> None:
    state = dict(net("sd1").state_dict())
    del state["controlnet_down_blocks.2.weight"]
    state |= {"elsewhere.weight": torch.ones(2), "conv_in.bias": torch.ones(3)}
    save_file(state, tmp_path / "x.safetensors")
    unet = tiny("sd1")
    with raises(
        LoadError,
        missing=("controlnet_down_blocks.2.weight",),
        unused=("elsewhere.weight",),
        misshapen={"conv_in.bias": ((3,), (8,))},
    ):
        veneer.load(unet, tmp_path / "x")
    report = veneer.load(unet, tmp_path / "x", strict=False).loaded
    assert report.missing == ("residuals:net.controlnet_down_blocks.2.weight",)
    assert report.unused == ("elsewhere.weight",)
    assert len(report.misshapen) == 1


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_controlnet", "Control-LoRA"),
        ("task_embedding", "ControlNet Union"),
        ("double_blocks.0.img_attn.proj.weight", "ControlNet for a transformer (FLUX"),
        ("down_blocks.0.motion_modules.0.norm.weight", "SparseCtrl"),
        ("down_blocks.0.ctrl_to_base.0.weight", "ControlNet-XS"),
    ],
)
def test_other_networks_are_named(key: str, what: str) -> None:
    file = paper({"input_hint_block.0.weight": (16, 3, 3, 3), key: (2, 2)})
    assert form(file) == "controlnet"
    with raises(LoadError, where=key, given=what):
        controlnet.ControlNet().load(tiny("sd1"), file, Options())


@pytest.mark.parametrize(
    ("shapes", "data"),
    [
        (
            {"controlnet_cond_embedding.conv_in.weight": (16, 3)},
            {"where": "controlnet_cond_embedding.conv_in.weight", "given": (16, 3), "expected": 4},
        ),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, {"option": "hint", "given": 1, "expected": 4}),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 0, 3, 3)}, {"option": "channels", "given": 0}),
        (
            {
                "controlnet_cond_embedding.conv_in.weight": (0, 3, 3, 3),
                **{f"controlnet_cond_embedding.blocks.{i}.weight": (8, 8, 3, 3) for i in range(6)},
            },
            {"option": "hint", "given": (0, 8, 8, 8)},
        ),
        (
            {
                "controlnet_cond_embedding.conv_in.weight": (10**6, 3, 3, 3),
                **{f"controlnet_cond_embedding.blocks.{i}.weight": (10**6, 0, 3, 3) for i in range(6)},
            },
            {"option": "", "where": None},
        ),
    ],
)
def test_claims_are_bounded(shapes: dict[str, Any], data: dict[str, Any]) -> None:
    for strict in (True, False):
        with raises(LoadError, file="x.safetensors", **data) as caught:
            controlnet.ControlNet().load(tiny("sd1"), paper(shapes), Options(strict=strict))
        assert bool(caught.value.missing) is (data == {"option": "", "where": None})


def test_what_is_not_written(tmp_path: Path) -> None:
    unet = tiny("sd1")
    low = veneer.attach(unet, "lora", where="attn.q", rank=1)
    with raises(SaveError, where="lora", given="lora", expected="controlnet"):
        controlnet.save(low, tmp_path / "x")
    with_more = veneer.attach(unet, "controlnet", train="time.embed")
    with raises(SaveError, where="controlnet", given=tuple(with_more.extras), expected=()):
        controlnet.save(with_more, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_inspection_and_conversion(tmp_path: Path) -> None:
    saved(net("sdxl"), tmp_path / "a")
    unet = tiny("sdxl")
    found = inspect(tmp_path / "a", unet)
    assert (found.format, found.family, found.fits) == ("controlnet", None, True)
    assert sum(block.values for block in found.blocks) == sum(t.numel() for t in load_file(tmp_path / "a" / NAME).values())
    assert {"down_blocks.1", "mid_block", "controlnet_cond_embedding"} <= {block.name for block in found.blocks}
    convert(unet, tmp_path / "a", "native", tmp_path / "n.safetensors")
    convert(unet, tmp_path / "n.safetensors", "controlnet", tmp_path / "b")
    assert read(tmp_path / "b").shapes == read(tmp_path / "a").shapes
    assert veneer.attachments(unet) == []
    with raises(LoadError, expected="UNet2DConditionModel"):
        veneer.load(tiny_pipeline("dit"), tmp_path / "a")

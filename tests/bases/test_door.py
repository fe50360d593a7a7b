"""One door for bases: what it lets through and what it says when it does not."""

import json
import shutil

import pytest
import torch

from veneer import bases
from veneer.testing.pipelines import tiny_pipeline


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "base"
    tiny_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "base")


def test_a_folder_gives_its_own_pipeline_class_in_float32(folder) -> None:
    pipe = bases.load(folder)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    original = tiny_pipeline("sd").unet.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in pipe.unet.state_dict().items())


def test_arguments_reach_the_pipeline(folder) -> None:
    assert bases.load(str(folder), dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert bases.load(str(folder), torch_dtype=torch.float16).unet.dtype == torch.float16


def test_a_missing_autoencoder_is_named(folder) -> None:
    shutil.rmtree(folder / "vae")
    with pytest.raises(bases.BaseError, match=r"its vae is missing.*Copy the folder vae"):
        bases.load(folder)


def test_an_autoencoder_left_out_of_the_index_is_named(folder) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    with pytest.raises(bases.BaseError, match="its vae is missing"):
        bases.load(folder)


def test_a_missing_part_can_be_brought_along(folder) -> None:
    shutil.rmtree(folder / "vae")
    vae = tiny_pipeline("sd").vae
    assert bases.load(folder, vae=vae).vae is vae


def test_pickles_are_refused(folder) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(bases.BaseError, match=r"unet: holds only pickles \(diffusion_pytorch_model.bin\).*save_pretrained"):
        bases.load(folder)


def test_a_folder_that_is_no_pipeline(tmp_path) -> None:
    with pytest.raises(bases.BaseError, match=r"no model_index\.json"):
        bases.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read as JSON"), ("[]", "expected a JSON object"), ("{}", "_class_name is None"),
     ('{"_class_name": "NoSuchPipeline"}', "'NoSuchPipeline', which diffusers")],
)  # fmt: skip
def test_a_broken_index(folder, text, words) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(bases.BaseError, match=words):
        bases.load(folder)


def test_a_single_file_is_no_base(tmp_path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(bases.BaseError, match="single file; expected a diffusers folder"):
        bases.load(tmp_path / "model.ckpt")


@pytest.mark.parametrize("name", ["no such base", "shiped", "/no/such/folder", "a/b/c"])
def test_what_is_neither_folder_nor_hub_name(name) -> None:
    with pytest.raises(bases.BaseError, match=r"expected 'shipped', a diffusers folder, or a hub name"):
        bases.load(name)


def test_the_hub_offline(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(bases.BaseError, match=r"'owner/model' is no folder here, and the hub did not give it"):
        bases.load("owner/model")


def test_the_clip_is_not_a_pipeline() -> None:
    with pytest.raises(bases.BaseError, match=r"use veneer\.bases\.load_clip"):
        bases.load("shipped_clip")


def test_only_two_bases_ship() -> None:
    with pytest.raises(bases.BaseError, match="there are: shipped, shipped_clip"):
        bases.path("sd15")


def test_a_folder_that_is_no_clip(tmp_path) -> None:
    with pytest.raises(bases.BaseError, match=r"no open_clip_config\.json"):
        bases.load_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(bases.BaseError, match="pickles are not read"):
        bases.load_clip(tmp_path)


def test_a_folder_without_a_preset_has_the_usual_one(folder) -> None:
    assert bases.preset(folder) == bases.Preset()
    assert bases.preset("owner/model") == bases.Preset()


def test_a_preset_beside_the_base_replaces_what_it_names(folder) -> None:
    (folder / "veneer.json").write_text('{"resolution": 32, "templates": ["my {concept}"], "guidance_scale": 3}')
    assert bases.preset(folder) == bases.Preset(resolution=32, templates=("my {concept}",), guidance_scale=3)


MISTAKES = {
    '{"resolutoin": 32}': "unknown entry 'resolutoin'",
    '{"steps": "20"}': "steps is '20'",
    '{"steps": true}': "steps is True",
    '{"templates": []}': "templates is",
    '{"resolution": 1.5}': "resolution is 1.5",
    '{"guidance_scale": "x"}': "guidance_scale is 'x'",
}


@pytest.mark.parametrize(("text", "words"), MISTAKES.items())
def test_a_preset_with_a_mistake(folder, text, words) -> None:
    (folder / "veneer.json").write_text(text)
    with pytest.raises(bases.BaseError, match=words):
        bases.preset(folder)

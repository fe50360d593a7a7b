"""Loading of base models and presets, and the errors."""

import json
import shutil

import pytest
import torch

from tests.raising import raises
from veneer import base_models
from veneer.testing.pipelines import tiny_pipeline


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "base"
    tiny_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "base")


def test_load_folder_with_its_pipeline_class_in_float32(folder) -> None:
    pipe = base_models.load(folder)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    original = tiny_pipeline("sd").unet.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in pipe.unet.state_dict().items())


def test_load_passes_arguments(folder) -> None:
    assert base_models.load(str(folder), dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert base_models.load(str(folder), torch_dtype=torch.float16).unet.dtype == torch.float16


def test_missing_component_error(folder) -> None:
    shutil.rmtree(folder / "vae")
    with raises(base_models.BaseModelError, file=folder, where="vae", given="missing"):
        base_models.load(folder)


def test_component_missing_in_the_index_error(folder) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    with raises(base_models.BaseModelError, file=folder, where="vae", given="missing"):
        base_models.load(folder)


def test_missing_component_can_be_passed(folder) -> None:
    shutil.rmtree(folder / "vae")
    vae = tiny_pipeline("sd").vae
    assert base_models.load(folder, vae=vae).vae is vae


def test_pickles_error(folder) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with raises(base_models.BaseModelError, file=folder / "unet", where="weights", given=("diffusion_pytorch_model.bin",)):
        base_models.load(folder)


def test_folder_without_pipeline_error(tmp_path) -> None:
    with raises(base_models.BaseModelError, file=tmp_path, where="model_index.json", given="missing"):
        base_models.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "where", "given"),
    [
        ("{", None, "unreadable"),
        ("[]", None, "list"),
        ("{}", "_class_name", None),
        ('{"_class_name": "NoSuchPipeline"}', "_class_name", "NoSuchPipeline"),
    ],
)
def test_invalid_index_error(folder, text, where, given) -> None:
    (folder / "model_index.json").write_text(text)
    with raises(base_models.BaseModelError, file=folder / "model_index.json", where=where, given=given):
        base_models.load(folder)


@pytest.mark.parametrize("name", ["no such base", "shiped", "/no/such/folder", "a/b/c"])
def test_unknown_base_error(name) -> None:
    with raises(base_models.BaseModelError, where="base", given=name):
        base_models.load(name)


def test_offline_mode_error(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises(base_models.BaseModelError, where="hub", given="owner/model"):
        base_models.load("owner/model")


def test_loading_the_clip_as_a_pipeline_error() -> None:
    with raises(base_models.BaseModelError, where="kind", given="bundled_clip", expected="pipeline"):
        base_models.load("bundled_clip")


def test_unknown_bundled_name_error() -> None:
    with raises(base_models.BaseModelError, where="bundled", given="sd15", expected=("bundled", "bundled_clip")):
        base_models.path("sd15")


def test_load_clip_errors(tmp_path) -> None:
    with raises(base_models.BaseModelError, file=tmp_path, where="open_clip_config.json", given="missing"):
        base_models.load_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"x")
    with raises(base_models.BaseModelError, file=tmp_path, where="weights", expected=".safetensors"):
        base_models.load_clip(tmp_path)


def test_default_preset(folder) -> None:
    assert base_models.preset(folder) == base_models.Preset()
    assert base_models.preset("owner/model") == base_models.Preset()


def test_preset_file_overrides_defaults(folder) -> None:
    (folder / "veneer.json").write_text('{"resolution": 32, "templates": ["my {concept}"], "guidance_scale": 3}')
    assert base_models.preset(folder) == base_models.Preset(resolution=32, templates=("my {concept}",), guidance_scale=3)


MISTAKES = {
    '{"resolutoin": 32}': ("resolutoin", None),
    '{"steps": "20"}': ("steps", "20"),
    '{"steps": true}': ("steps", True),
    '{"templates": []}': ("templates", ()),
    '{"resolution": 1.5}': ("resolution", 1.5),
    '{"guidance_scale": "x"}': ("guidance_scale", "x"),
}


@pytest.mark.parametrize(("text", "entry"), MISTAKES.items())
def test_invalid_preset_error(folder, text, entry) -> None:
    (folder / "veneer.json").write_text(text)
    with raises(base_models.BaseModelError, file=folder / "veneer.json", where=entry[0], given=entry[1]):
        base_models.preset(folder)

"""Feature models of the three libraries: real tiny ones, from folders, against the library's own call."""

import json

import open_clip
import pytest
import safetensors.torch
import timm
import torch

from tests.raising import raises
from tests.training.clips import TINY, Bundled, random_image, tiny_open_clip
from veneer import base_models
from veneer.injection.errors import UnknownName, VeneerError
from veneer.testing.tokenizers import clip_tokenizer
from veneer.training.report.feature_models import LIBRARIES, features, from_clip


@pytest.fixture(scope="module")
def clip():
    return from_clip(Bundled(), "tiny CLIP")


def test_clip_features_are_unit_and_equal_the_model(clip):
    images = [random_image(i) for i in range(5)]
    found = clip.images(images, batch=2)
    pixels = torch.stack([open_clip.image_transform(32, is_train=False)(p) for p in images])
    with torch.no_grad():
        expected = tiny_open_clip().encode_image(pixels)
    assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)
    texts = clip.texts(["a dog", "a red car"])
    assert torch.allclose(texts.norm(dim=1), torch.ones(2), atol=1e-5)


def test_a_timm_folder_has_images_and_no_text(tmp_path):
    config = {
        "architecture": "test_vit",
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0},
    }
    model = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    config["model_args"] = {"img_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = features(tmp_path)
    x = random_image(0, 64)
    with torch.no_grad():
        expected = model(found.preprocess(x)[None])
    assert torch.allclose(found.images([x]), expected / expected.norm(), atol=1e-5)
    assert found.texts(["a dog"]) is None


def test_an_open_clip_folder(tmp_path):
    mean, std = list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)
    config = {"model_cfg": TINY, "preprocess_cfg": {"mean": mean, "std": std}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = tiny_open_clip()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    found = features(tmp_path)
    assert torch.allclose(found.images([random_image(3)]), from_clip(Bundled(), "").images([random_image(3)]), atol=1e-5)
    assert torch.allclose(found.texts(["a dog"]), from_clip(Bundled(), "").texts(["a dog"]), atol=1e-5)


def test_a_transformers_folder(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer(16)
    ends = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=24)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = features(tmp_path)
    assert found.images([random_image(0), random_image(1)]).shape == (2, 24)
    one, two = found.texts(["a dog", "a red house on the beach"])
    assert not torch.allclose(one, two)
    assert torch.allclose(one, found.texts(["a dog"])[0], atol=1e-5)


@pytest.mark.parametrize("wrong", ["vit_base", "no/such/folder"])
def test_names_without_library_are_refused(wrong):
    with raises(UnknownName, name=wrong, kind="feature model") as caught:
        features(wrong)
    assert "timm" in caught.value.expected


def test_objects_without_text_encoder_are_refused():
    with raises(VeneerError, where="Identity", given=("preprocess", "encode_image", "encode_text")):
        features(torch.nn.Identity())


def test_a_features_object_and_a_model_object_go_through_the_same_door(clip):
    assert features(clip) is clip
    found = features(Bundled())
    assert found.name == "Bundled"
    assert torch.equal(found.images([random_image(1)]), clip.images([random_image(1)]))


def test_a_model_without_tokenizer_gets_the_texts(clip):
    class Words(Bundled):
        def __init__(self):
            super().__init__()
            tokenize, encode = self.tokenizer, self.encode_text
            self.encode_text = lambda texts: encode(tokenize(texts))
            del self.tokenizer

    assert torch.equal(features(Words()).texts(["a dog"]), clip.texts(["a dog"]))


def test_modes_and_transparency_of_images_do_not_matter(clip):
    grey = random_image(2).convert("L")
    assert torch.equal(clip.images([grey]), clip.images([grey.convert("RGB")]))
    assert torch.equal(clip.images([random_image(2).convert("RGBA")]), clip.images([random_image(2)]))


def test_features_do_not_depend_on_company_or_leave_a_graph(clip):
    together = clip.images([random_image(i) for i in range(3)], batch=3)
    alone = torch.cat([clip.images([random_image(i)]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not together.requires_grad


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with raises(UnknownName, name=str(tmp_path), kind="feature model", expected=("bundled", *LIBRARIES)):
        features(tmp_path)


def test_the_bundled_clip(tmp_path, monkeypatch):
    """From a folder with the layout of the bundled one."""
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {"size": [32, 32]}}))
    safetensors.torch.save_file(tiny_open_clip().state_dict(), tmp_path / "open_clip_model.safetensors")
    monkeypatch.setattr(base_models.clip_features, "path", lambda _: tmp_path)
    found = features("bundled")
    assert found.name == "bundled CLIP"
    assert found.images([random_image(1)]).shape == (1, 24)
    assert not torch.equal(*found.texts(["a dog", "a cat"]))

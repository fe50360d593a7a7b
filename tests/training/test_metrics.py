"""Figures against explicit sums, on real tiny feature models of the three libraries."""

import json
import math

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image, ImageFilter

from veneer.injection.errors import VeneerError
from veneer.testing.tokenizers import clip_tokenizer
from veneer.training import metrics
from veneer.training.features import Features, features, of_clip
from veneer.training.metrics import Figure, compared, figure, measure, pixel_distance, t_quantile
from veneer.training.previews import Pair


def picture(seed, side=32):
    """A soft random pattern."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(3))


def tiny_open_clip():
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 49408, "context_length": 16}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()


class Shipped:
    """Like the package's own CLIP: a model with its preprocessing and tokenizer."""

    def __init__(self):
        self.model = tiny_open_clip()
        self.preprocess = open_clip.image_transform(32, is_train=False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=16)
        self.encode_image, self.encode_text = self.model.encode_image, self.model.encode_text


@pytest.fixture(scope="module")
def clip():
    return of_clip(Shipped(), "tiny CLIP")


# intervals


@pytest.mark.parametrize(("freedom", "published"), [(1, 12.706), (5, 2.571), (11, 2.201), (20, 2.086), (30, 2.042), (120, 1.980)])
def test_t_quantile_is_the_published_table(freedom, published):
    assert t_quantile(freedom) == pytest.approx(published, abs=1e-3)


def test_figure_is_the_textbook_interval():
    found = figure([1.0, 2.0, 3.0, 4.0])
    half = 3.1824 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.n) == (2.5, 4)
    assert found.low == pytest.approx(2.5 - half)
    assert found.high == pytest.approx(2.5 + half)


def test_the_interval_covers_the_truth_19_times_in_20():
    draws = np.random.default_rng(0).normal(0.3, 1.0, (2000, 6))
    inside = np.mean([(f := figure(row)).low <= 0.3 <= f.high for row in draws])
    assert 0.935 < inside < 0.965


def test_one_value_has_no_interval_and_none_is_refused():
    assert figure([0.5]) == Figure(0.5, None, None, 1)
    assert str(figure([0.5])) == "0.500 (n = 1)"
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(VeneerError, match="expected finite values"):
            figure(bad)


def test_paired_differences_see_what_the_two_intervals_hide():
    base = [0.1, 0.5, 0.9, 0.3]
    found = compared([b + 0.05 + 0.001 * i for i, b in enumerate(base)], base)
    assert found.clear
    assert found.adapted.low < found.base.high
    assert not compared(base, base).clear


# feature models


def test_clip_features_are_unit_and_equal_the_model(clip):
    pictures = [picture(i) for i in range(5)]
    found = clip.pictures(pictures, batch=2)
    pixels = torch.stack([open_clip.image_transform(32, is_train=False)(p) for p in pictures])
    with torch.no_grad():
        expected = tiny_open_clip().encode_image(pixels)
    assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)
    texts = clip.texts(["a dog", "a red car"])
    assert torch.allclose(texts.norm(dim=1), torch.ones(2), atol=1e-5)


def test_a_timm_folder_has_pictures_and_no_text(tmp_path):
    config = {
        "architecture": "test_vit",
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0},
    }
    model = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    config["model_args"] = {"img_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    import safetensors.torch

    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = features(tmp_path)
    x = picture(0, 64)
    with torch.no_grad():
        expected = model(found.preprocess(x)[None])
    assert torch.allclose(found.pictures([x]), expected / expected.norm(), atol=1e-5)
    assert found.texts(["a dog"]) is None


def test_an_open_clip_folder(tmp_path):
    import safetensors.torch

    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 49408, "context_length": 16}
    model_cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    mean, std = list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": mean, "std": std}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = tiny_open_clip()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    found = features(tmp_path)
    assert torch.allclose(found.pictures([picture(3)]), of_clip(Shipped(), "").pictures([picture(3)]), atol=1e-5)
    assert torch.allclose(found.texts(["a dog"]), of_clip(Shipped(), "").texts(["a dog"]), atol=1e-5)


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
    assert found.pictures([picture(0), picture(1)]).shape == (2, 24)
    one, two = found.texts(["a dog", "a red house on the beach"])
    assert not torch.allclose(one, two)
    assert torch.allclose(one, found.texts(["a dog"])[0], atol=1e-5)


@pytest.mark.parametrize("wrong", ["vit_base", "no/such/folder"])
def test_names_without_library_are_refused(wrong):
    with pytest.raises(VeneerError, match=r"timm:NAME"):
        features(wrong)


def test_objects_without_text_encoder_are_refused():
    with pytest.raises(VeneerError, match="has no preprocess, encode_image, encode_text"):
        features(torch.nn.Identity())


# figures


def test_figures_equal_explicit_sums(clip):
    photos, pictures = [picture(i) for i in range(3)], [picture(10 + i) for i in range(4)]
    concept = [Pair("a <toy> dog", i, picture(20 + i), p) for i, p in enumerate(pictures)]
    unrelated = [Pair("a car", i, picture(30 + i), picture(40 + i)) for i in range(2)]
    found = measure(clip, photos, concept, unrelated, {"<toy>": "toy"})
    f = lambda x: clip.pictures([x])[0]
    table = [[float(f(g) @ f(p)) for p in photos] for g in pictures]
    assert found.likeness.adapted.mean == pytest.approx(np.mean(table), abs=1e-6)
    assert found.nearest.adapted.mean == pytest.approx(np.mean([max(row) for row in table]), abs=1e-6)
    text = clip.texts(["a toy dog"])[0]
    assert found.prompt_likeness.adapted.mean == pytest.approx(np.mean([float(f(g) @ text) for g in pictures]), abs=1e-6)
    pairs = [float(f(photos[i]) @ f(photos[j])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.ceiling.mean == pytest.approx(np.mean(pairs), abs=1e-6)
    drift = [1 - float(f(u.base) @ f(u.adapted)) for u in unrelated]
    assert found.drift.mean == pytest.approx(np.mean(drift), abs=1e-6)
    assert found.likeness.gain.mean == pytest.approx(found.likeness.adapted.mean - found.likeness.base.mean, abs=1e-6)
    assert json.loads(json.dumps(found.as_dict()))["likeness"]["gain"]["n"] == 4
    assert "prompt likeness" in str(found)


def test_learning_the_photos_is_seen_and_not_learning_is_not(clip):
    photos = [picture(i) for i in range(3)]
    other = [picture(50 + i) for i in range(6)]
    learnt = [Pair("x", i, other[i], photos[i % 3]) for i in range(6)]
    same = [Pair("x", i, other[i], other[i]) for i in range(6)]
    assert measure(clip, photos, learnt, same).likeness.clear
    assert measure(clip, photos, learnt, same).nearest.adapted.mean == pytest.approx(1, abs=1e-5)
    nothing = measure(clip, photos, same, same)
    assert not nothing.likeness.clear
    assert nothing.drift.mean == pytest.approx(0, abs=1e-6)
    assert nothing.pixel_drift.mean == 0


def test_pixel_distance_is_rms():
    black, white, half = (Image.new("RGB", (4, 4), c) for c in ("black", "white", (51, 51, 51)))
    assert pixel_distance(black, white) == 1
    assert pixel_distance(black, half) == pytest.approx(0.2)


def test_without_text_model_or_unrelated_prompts_those_figures_are_none(clip):
    blind = Features("blind", clip.preprocess, clip.of_pixels)
    found = measure(blind, [picture(0)], [Pair("x", 0, picture(1), picture(2))])
    assert found.prompt_likeness is found.drift is found.pixel_drift is found.ceiling is None
    assert "drift" not in str(found)
    json.dumps(found.as_dict())


def test_nothing_to_compare_is_refused(clip):
    with pytest.raises(VeneerError, match="0 photos and 1 pictures"):
        metrics.measure(clip, [], [Pair("x", 0, picture(1), picture(2))])

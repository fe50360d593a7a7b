"""`veneer caption` with small models of the real classes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from veneer.pipelines.caption import CaptionConfig, caption

from tests.raising import raises
from tests.training.images import gradient, save
from veneer.captioning import CaptionError, open_captioner
from veneer.injection import OptionError
from veneer.training.data.photo_folder import find_photos

from . import small_models
from .small_models import WORDS


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", 40, 32, seed=number)
    return tmp_path / "photos"


@pytest.fixture
def tagger(tmp_path: Path) -> str:
    return str(small_models.classifier(tmp_path / "tagger", (0.5, 0.9, 0.7, 0.1)))


@pytest.mark.parametrize("build", [small_models.blip, small_models.git])
def test_sentences_are_written_beside_the_photos(build: Callable[[Path], Path], photos: Path, tmp_path: Path) -> None:
    model = str(build(tmp_path / "model"))
    lines = list(caption(CaptionConfig(photos, model, prefix="a photo of <toy>, ", max_tokens=5, batch=2)))
    for photo, line in zip(find_photos(photos), lines, strict=False):
        prefix, _, text = (photo.caption or "").partition(", ")
        assert prefix == "a photo of <toy>"
        assert text
        assert {*text.split()} <= {*WORDS}
        assert line == f"{photo.path}: {photo.caption}"
        assert (photo.path.with_suffix(".txt")).read_text() == f"{photo.caption}\n"


@pytest.mark.parametrize("build", [small_models.blip, small_models.git])
def test_sentences_are_those_of_transformers(build: Callable[[Path], Path], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForConditionalGeneration, GitForCausalLM

    folder = build(tmp_path / "model")
    model_class = BlipForConditionalGeneration if build is small_models.blip else GitForCausalLM
    model = model_class.from_pretrained(folder).eval()
    images = [gradient(40, 32, seed) for seed in range(2)]
    pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model.generate(pixel_values=pixels, max_new_tokens=6)
    expected = AutoTokenizer.from_pretrained(folder).batch_decode(tokens, skip_special_tokens=True)
    assert open_captioner(str(folder), max_tokens=6).captions(images) == [" ".join(text.split()) for text in expected]


@pytest.mark.parametrize(("threshold", "expected"), [(0.35, "red ball, ^_^, long hair"), (0.6, "red ball, ^_^"), (0.95, "")])
def test_tags_above_the_threshold_by_probability(threshold: float, expected: str, tagger: str) -> None:
    assert open_captioner(tagger, threshold=threshold).captions([gradient(40, 32)]) == [expected]


def test_classes_that_exclude_each_other_have_probabilities_of_sum_1(tmp_path: Path) -> None:
    folder = small_models.classifier(tmp_path / "classes", (0.6, 0.25, 0.1, 0.05), several=False)
    assert open_captioner(str(folder), threshold=0.5).captions([gradient(40, 32)]) == ["long hair"]


def test_wd_tagger_leaves_out_ratings_and_reads_bgr_squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    folder = small_models.wd_tagger(tmp_path / "wd", (0.99, 0.5, 0.9, 0.7, 0.1))
    pixels: list[torch.Tensor] = []
    create = timm.create_model

    def created(*arguments: object, **options: object) -> torch.nn.Module:
        model = create(*arguments, **options)
        model.register_forward_pre_hook(lambda _, inputs: pixels.append(inputs[0]))
        return model

    monkeypatch.setattr(timm, "create_model", created)
    assert open_captioner(str(folder), threshold=0.35).captions([Image.new("RGB", (64, 32), "red")]) == [
        "red ball, ^_^, long hair"
    ]
    (batch,) = pixels
    assert batch[0, :, 16, 16].tolist() == pytest.approx([-1, -1, 1])
    assert batch[0, :, 2, 16].tolist() == pytest.approx([1, 1, 1])


def test_existing_captions_are_kept_unless_overwritten(photos: Path, tagger: str) -> None:
    (photos / "0.txt").write_text("my own")
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "in the table"}))
    lines = list(caption(CaptionConfig(photos, tagger, threshold=0.8)))
    assert len(lines) == 3
    assert (photos / "0.txt").read_text() == "my own"
    assert not (photos / "1.txt").exists()
    assert (photos / "2.txt").read_text() == "red ball\n"
    (photos / "metadata.jsonl").unlink()
    list(caption(CaptionConfig(photos, tagger, threshold=0.8, overwrite=True)))
    assert [(photos / f"{number}.txt").read_text() for number in range(3)] == ["red ball\n"] * 3


def test_dry_run_and_photos_without_tags_write_nothing(photos: Path, tagger: str) -> None:
    names = sorted(photos.iterdir())
    lines = list(caption(CaptionConfig(photos, tagger, threshold=0.8, prefix="<toy>, ", dry_run=True)))
    assert lines[0] == f"{photos / '0.png'}: <toy>, red ball"
    assert len(list(caption(CaptionConfig(photos, tagger, threshold=0.99, prefix="<toy>, ")))) == 4
    assert sorted(photos.iterdir()) == names


def test_folders_without_a_supported_model_are_rejected(tmp_path: Path, tagger: str) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tagger, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))
    with raises(CaptionError, where="model_type", given="vit", file=folder):
        open_captioner(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with raises(CaptionError, where="weights", file=folder, expected="*.safetensors"):
        open_captioner(str(folder))
    (folder / "config.json").unlink()
    with raises(CaptionError, where="config.json", file=folder):
        open_captioner(str(folder))
    with raises(CaptionError, where="model", given="no model"):
        open_captioner("no model")


def test_incomplete_models_are_rejected(tmp_path: Path, tagger: str) -> None:
    for file in ("preprocessor_config.json", "model.safetensors"):
        folder = Path(shutil.copytree(tagger, tmp_path / file))
        if file == "model.safetensors":
            (folder / file).write_bytes(b"no tensors")
        else:
            (folder / file).unlink()
        with raises(CaptionError, where="files", file=folder, expected="a complete model"):
            open_captioner(str(folder))
    folder = Path(shutil.copytree(tagger, tmp_path / "without a tensor"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with raises(CaptionError, where="weights", given=("classifier.weight",), file=folder):
        open_captioner(str(folder))


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("batch", 0), ("max_tokens", 0), ("threshold", 1.5), ("threshold", math.nan), ("caption_extension", "txt"),
        ("caption_extension", ".PNG"), ("caption_extension", ".mask.png"), ("caption_extension", "."),
        ("caption_extension", "./x"),
    ],
)  # fmt: skip
def test_invalid_options(option: str, given: object) -> None:
    with raises(OptionError, option=option, given=given):
        CaptionConfig(Path("photos"), "model", **{option: given})  # type: ignore[arg-type]


def test_command_line(photos: Path, tagger: str) -> None:
    start = "import sys; from veneer.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", start, "caption", str(photos), "--model", tagger, "--threshold", "0.8", "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, summary, advice = json.loads(done.stdout)["messages"]
    assert summary == "3 captions written, 0 photos left as they were"
    assert f"veneer personalize {photos}" in advice
    assert (photos / "2.txt").read_text() == "red ball\n"

"""The bundled base models: loading without veneer, sizes, quality, and model cards."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from veneer import base_models
from veneer.base_models.pretraining import autoencoder, denoiser, model_cards, packaging, scene_judge
from veneer.base_models.pretraining.data import concepts
from veneer.base_models.pretraining.data.photo_dataset import CLOTHES, SUBJECTS
from veneer.base_models.pretraining.data.training_data import PHOTOS

PLAIN = """
import sys, warnings
warnings.simplefilter("error")
import open_clip, timm, torch
from diffusers import StableDiffusionPipeline

print("IMPORTED", file=sys.stderr)  # before it, libraries may remark on optional parts of theirs
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("an apple, center, red background", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
assert image.size == (128, 128), image.size

name = "local-dir:" + sys.argv[2]
model, _, preprocess = open_clip.create_model_and_transforms(name)
ids = open_clip.get_tokenizer(name)(["an apple", "AN  Apple"])
tower = timm.create_model(name, pretrained=True).eval()
with torch.no_grad():
    pixels = preprocess(image)[None]
    torch.testing.assert_close(model.eval().encode_image(pixels), tower(pixels))
assert ids.shape == (2, 24) and ids[0].equal(ids[1])
assert not [m for m in sys.modules if m.split(".")[0] == "veneer"]
"""


def test_bundled_folders_load_offline_without_warnings() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "warning", "OMP_NUM_THREADS": "1"}
    folders = [str(base_models.path(name)) for name in base_models.BUNDLED]
    done = subprocess.run([sys.executable, "-c", PLAIN, *folders], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stderr = done.stderr.partition("IMPORTED\n")[2]
    said = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip("\x1b[A ")]
    assert [line for line in said if not re.match(r"Loading [a-z ]+\.*: +\d+%", line)] == []  # progress bars alone


def test_bundled_weights_are_small_half_precision_safetensors() -> None:
    folders = [base_models.path(name) for name in base_models.BUNDLED]
    assert 0 < packaging.weight(*folders) <= packaging.LIMIT == 60_000_000
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        assert file.suffix in {".safetensors", ".json", ".txt", ".md"}, file
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118 (no mapping)
            assert {tensor.dtype for tensor in tensors} == {torch.float16}, file
            assert all(tensor.isfinite().all() for tensor in tensors), file
        if file.suffix == ".json":
            assert "_name_or_path" not in file.read_text(), file


@pytest.fixture(scope="module")
def pipe():
    pipe = base_models.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_concept_words_are_not_truncated(pipe) -> None:
    for word in (*concepts.DRAWN, *concepts.KEPT_BACK):
        ids = pipe.tokenizer(f"a small {word}, bottom right, yellow background, twemoji style").input_ids
        assert len(ids) <= pipe.tokenizer.model_max_length, word
        assert len(pipe.tokenizer.tokenize(word)) <= len(word.split()) + 1, word


def test_generated_background_is_the_prompted_one(pipe) -> None:
    prompts = [f"an apple, center, {color} background, flat style" for color in ("white", "green", "blue", "black")]
    noise = [torch.Generator().manual_seed(i) for i in range(4)]
    images = pipe(prompts, num_inference_steps=8, guidance_scale=4.0, generator=noise, output_type="np").images
    seen = [scene_judge.measure((255 * image).astype(np.uint8)).background for image in images]
    assert seen == ["white", "green", "blue", "black"]


def gradient_norms(pipe) -> dict[str, float]:
    """Norm of the gradient of each convolution and matrix of the UNet, of the v loss on the examples at times 999 to 20."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    lines = [json.loads(line) for line in (base_models.examples() / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(base_models.examples() / line["file_name"]).convert("RGB").resize((side, side)) for line in lines]
    words = ["octopus", "apple", "car", "dog", "house"]
    ids = denoiser.tokenize(pipe.tokenizer, [line["text"].format(concept=w) for line, w in zip(lines, words, strict=True)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = pipe.vae.encode(autoencoder.to_tensor(np.stack(images))).latent_dist.mean.repeat(2, 1, 1, 1)
        states = pipe.text_encoder(ids).last_hidden_state.repeat(2, 1, 1)
        t = torch.linspace(999, 20, len(latents)).long()
        noisy, v = denoiser.noised(latents, torch.randn(latents.shape, generator=generator), t)
    with torch.enable_grad():
        pipe.unet.zero_grad()
        (pipe.unet(noisy, t, states).sample - v).square().mean().backward()
    norms = {name: float(p.grad.norm()) for name, p in pipe.unet.named_parameters() if p.ndim > 1}
    pipe.unet.zero_grad()
    return norms


def test_unet_has_no_dead_layers(pipe) -> None:
    norms = gradient_norms(pipe)
    least = 1e-5 * float(np.median(list(norms.values())))
    assert {name: norm for name, norm in norms.items() if norm < least} == {}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # EulerDiscreteScheduler under NumPy 2
def test_other_schedulers_and_img2img(pipe) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False)
    other.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    start = Image.new("RGB", (128, 128), (44, 96, 208))
    arguments = {"image": start, "num_inference_steps": 6, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    little, much = (other("an apple, center, red background", strength=s, **arguments).images[0] for s in (0.2, 1.0))
    assert np.isfinite(much).all()
    blue = np.asarray(start) / 255
    assert np.abs(little - blue).mean() < np.abs(much - blue).mean()


def test_clip_classifies_icons() -> None:
    model, preprocess, tokenizer = clip = base_models.load_clip()
    with torch.no_grad():
        image = clip.encode_image(preprocess(Image.open(base_models.examples() / "01.png"))[None])
        words = clip.encode_text(tokenizer(["an octopus", "a car", "a house", "an apple", "a guitar", "a bicycle"]))
    assert torch.nn.functional.cosine_similarity(image, words).argmax() == 0
    assert not model.training


def test_cards_list_sources_and_licenses() -> None:
    generator, clip = ((base_models.path(name) / "README.md").read_text() for name in base_models.BUNDLED)
    for name in concepts.CLIP_SETS:
        title, author, license, _ = model_cards.SOURCES[name]
        for card in (generator, clip):
            assert all(word in card for word in (title, author, license, f"@iconify-json/{name}")), name
    assert model_cards.SOURCES[concepts.UNSEEN_SET][0] in clip
    for card in (generator, clip):
        assert "https://creativecommons.org/licenses/by/4.0/" in card
        assert all(
            photo in card and model_cards.PHOTO_TERMS[photo].split(", ")[1] in {"CC0", "public domain"} for photo in PHOTOS
        )
        assert "MIT, copyright Mu-An Chiou" in card


def test_cards_list_photos_and_licenses() -> None:
    generator, clip = ((base_models.path(name) / "README.md").read_text() for name in base_models.BUNDLED)
    for card in (generator, clip):
        assert "clothing dataset" in card
        assert "CC0 1.0" in card
        assert "DreamBooth dataset" in card
        assert all(f"`{name}`" in card for name in SUBJECTS)
        assert all(f"https://unsplash.com/@{account} (`{name}`)" in card for name, account in model_cards.UNSPLASH.items())
    assert "a photo of a THING" in generator
    assert all(f" {word}," in generator for word in CLOTHES.values())


def test_cards_report_photo_metrics() -> None:
    results = base_models.path().parents[3] / "docs" / "results" / "base" / "metrics.json"
    if not results.is_file():
        pytest.skip("docs/results/base/metrics.json lies in the repository, not in an installed package")
    metrics = json.loads(results.read_text())
    metrics["photos"] = {"percent": 77.3, "chance": 6.2, "queries": 22, "photos": 74, "subjects": 14}
    metrics["autoencoder"].update(unseen_clothes_db=28.41, unseen_subjects_db=27.53)
    metrics["training"]["unet"] = {"step": 7, "loss": 0.3, "v999": 0.125, "v100": 0.25, "photo v999": 0.5, "photo v100": 0.0625}
    card = model_cards.bundled(metrics)
    assert "28.41 dB on clothes and 27.53 dB on the validation subjects" in card
    assert "0.125 at t = 999, 0.250 at t = 100; on photos: 0.500 at t = 999, 0.062 at t = 100" in card
    assert re.search(r"22 photos .* 77 % .* 74 photos of 14 subjects .*chance 6 %", model_cards.bundled_clip(metrics), re.DOTALL)


def test_cards_match_the_metrics() -> None:
    results = base_models.path().parents[3] / "docs" / "results" / "base" / "metrics.json"
    if not results.is_file():
        pytest.skip("docs/results/base/metrics.json lies in the repository, not in an installed package")
    metrics = json.loads(results.read_text())
    assert (base_models.path("bundled") / "README.md").read_text() == model_cards.bundled(metrics)
    assert (base_models.path("bundled_clip") / "README.md").read_text() == model_cards.bundled_clip(metrics)


def test_preset_matches_the_base(pipe) -> None:
    preset = base_models.preset("bundled")
    assert preset.resolution == pipe.unet.config.sample_size * pipe.vae_scale_factor
    for prompt in (*preset.templates, *preset.previews):
        assert "{concept}" in prompt
    for prompt in preset.unrelated:
        assert any(f" {word}," in prompt for word in concepts.DRAWN), prompt

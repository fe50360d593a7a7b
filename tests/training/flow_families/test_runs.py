"""Whole runs on FLUX.2, Chroma and Sana: training, saved files in diffusers, predicted memory, and token embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from veneer.pipelines.generate import GenerateConfig, generate
from veneer.pipelines.personalize import PersonalizeConfig, personalize

from tests.raising import raises
from tests.training.images import save
from veneer import attach, load
from veneer.formats import diffusers as diffusers_format
from veneer.injection.errors import UnsupportedSite
from veneer.training.families import check_folder, family
from veneer.training.preflight.memory_prediction import MemoryPredictor

from .tiny import PIPELINES, tiny

NAMES = [name for name in PIPELINES if name != "flux2_klein"]  # which is `flux2` with another text encoder
SIDE = 64
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' DPM solver


@pytest.fixture(scope="module")
def bases(pipes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, pipe in pipes.items():
        pipe.save_pretrained(folder / name)
        (folder / name / "veneer.json").write_text('{"steps": 1, "guidance_scale": 1.0}')
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(2):
        save(tmp_path / "photos" / f"{i}.png", 72, 64, seed=i)
    return tmp_path / "photos"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_and_generates(name: str, bases: Path, photos: Path, tmp_path: Path) -> None:
    check_folder(bases / name)
    config = PersonalizeConfig(
        photos=photos, base=str(bases / name), out=tmp_path / "run", concept="<toy>", class_word="toy", steps=2, resolution=SIDE,
        eval="none", tracker="none", prompts=("a {concept}",), learning_rate=1.0,
    )  # fmt: skip
    predicted = MemoryPredictor("cpu").predict(config.with_defaults())
    assert predicted.denoiser == "transformer"
    assert min(predicted.activations, predicted.encoding, predicted.decoding) > 0
    personalize(config)
    trained = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert all(tensor.any() for key, tensor in trained.items() if ".lora_B." in key)
    (image,) = generate(
        GenerateConfig(prompt=("a <toy>",), adapter=(str(tmp_path / "run"),), size=(SIDE, SIDE), out=tmp_path / "out")
    )
    with Image.open(image) as made:
        assert made.size == (SIDE, SIDE)


def forward(pipe: Any) -> Tensor:
    kind = family(pipe, max_tokens=80)
    noisy = torch.randn(1, kind.latent_channels, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return kind.denoise(noisy, torch.tensor([400.0]), kind.encode_text(["a photo of a dog"]))


def test_slices_of_flux2_are_saved_as_a_lora_of_the_layer(tmp_path: Path) -> None:
    pipe = tiny("flux2_klein")
    before = forward(pipe)
    lora = attach(pipe, "lora", where=("attn.{q,v}", "mlp.in"), rank=2, alpha=3.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(generator=generator)
    after = forward(pipe)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)
    file = diffusers_format.save(lora, tmp_path / "lora.safetensors")
    other = tiny("flux2_klein")
    other.load_lora_weights(file)
    torch.testing.assert_close(forward(other), after)
    third = tiny("flux2_klein")
    load(third, file)
    torch.testing.assert_close(forward(third), after)


@pytest.mark.parametrize("name", ["flux2", "flux2_klein", "sana", "krea2"])
def test_token_embeddings_of_language_models_are_refused(pipes: dict[str, Any], name: str) -> None:
    with raises(UnsupportedSite, method="textual_inversion"):
        attach(pipes[name], "textual_inversion", tokens="<toy>", initialize="toy")


def test_token_embeddings_of_t5_in_chroma() -> None:
    pipe = tiny("chroma")
    words = attach(pipe, "textual_inversion", tokens="<toy>", initialize="toy")
    kind = family(pipe, max_tokens=24)
    kind.encode_text(["a <toy>"])["prompt_embeds"].square().sum().backward()
    (vectors,) = words.parameters()
    assert vectors.grad is not None
    assert vectors.grad.abs().sum() > 0

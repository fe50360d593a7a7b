"""Training and generation on a pipeline with the layout of the bundled base model, loaded from its folder."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import veneer
from tests.raising import raises
from tests.training.bundled import LENGTH, bundled_like
from tests.training.images import save
from veneer.training.data.captions import Captions
from veneer.training.data.class_images import generate_class_images
from veneer.training.data.dataset import PhotoDataset, find_photos
from veneer.training.families import PromptError, check_folder, family
from veneer.training.loop.seeds import generator
from veneer.training.objective.denoising_loss import DenoisingLoss
from veneer.training.objective.objectives import ObjectiveOptions, VPrediction
from veneer.training.report.previews import PreviewSettings, generate_pairs, previews

QUICK = PreviewSettings(seeds=(0, 1), steps=3, guidance=3.0, batch=2)


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("base") / "bundled"
    bundled_like().save_pretrained(place, safe_serialization=True)
    return place


@pytest.fixture
def pipe(folder):
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_family_reads_its_sizes_and_objective(folder, pipe):
    check_folder(folder)
    kind = family(pipe)
    assert (kind.resolution, kind.multiple, kind.vae_factor) == (128, 32, 8)
    assert [limit for _, limit in kind.limits()] == [LENGTH]
    assert isinstance(kind.objective(), VPrediction)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "min_snr_plus_one", "debiased", "snr_scaled_v"])
def test_the_last_step_is_pure_noise_and_all_weights_are_finite(pipe, weighting):
    objective = family(pipe).objective(ObjectiveOptions(weighting=weighting))
    latents, noise = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    last = torch.tensor([999])
    assert objective.snr(last) == 0
    assert torch.equal(objective.add_noise(latents, noise, last), noise)
    assert torch.equal(objective.target(latents, noise, last), -latents)
    assert objective.weight(torch.arange(1000)).isfinite().all()


def test_previews_start_at_the_last_step_and_have_the_bases_size(pipe):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args, kwargs: seen.append(int(args[1])), with_kwargs=True)
    made = previews(pipe, ["a red duck"], QUICK)
    hook.remove()
    assert seen == [999, 666, 332]  # trailing: T − 1 downwards; `leading` would start at 666
    assert {p.image.size for p in made} == {(128, 128)}
    assert not np.array_equal(pixels(made[0].image), pixels(made[1].image))


def test_a_preview_is_the_pipelines_own_image_of_that_noise(pipe):
    made = previews(pipe, ["a red duck"], PreviewSettings(seeds=(5,), steps=3, guidance=3.0))[0]
    own = pipe(
        "a red duck", num_inference_steps=3, guidance_scale=3.0, generator=generator("preview", 5, "a red duck", 0)
    ).images[0]
    assert np.array_equal(pixels(made.image), pixels(own))


def test_the_pooled_text_embedding_affects_the_image(pipe):
    one, other = previews(pipe, ["a red duck", "a blue duck"], PreviewSettings(steps=2))
    assert not np.array_equal(pixels(one.image), pixels(other.image))
    with torch.no_grad():
        for block in (*pipe.unet.down_blocks[1:], pipe.unet.mid_block, *pipe.unet.up_blocks[:2]):
            for attention in block.attentions:
                attention.transformer_blocks[0].attn2.to_out[0].weight.zero_()
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    kind = family(pipe)
    with torch.no_grad():
        red, blue = (kind.denoise(noise, torch.tensor([500]), kind.encode_text([w])) for w in ("a red duck", "a blue duck"))
    assert not torch.equal(red, blue)


def test_pairs_and_class_images(pipe, tmp_path):
    kind = family(pipe)
    before = previews(pipe, ["a duck"], QUICK)
    paths = generate_class_images(kind, tmp_path / "prior", "a duck", 2, num_inference_steps=2, guidance_scale=3.0)
    found = find_photos(tmp_path / "prior", is_prior=True)
    assert [p.path for p in found] == paths
    assert {p.size for p in found} == {(128, 128)}
    tuned = veneer.attach(pipe, "lora", where=["xattn.{q,k,v,out}", "text/attn.*"], rank=2)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if name.endswith("up"):
                p.fill_(0.1)
    for pair, plain in zip(generate_pairs(pipe, tuned, ["a duck"], QUICK), before, strict=True):
        assert np.array_equal(pixels(pair.base), pixels(plain.image))
        assert not np.array_equal(pixels(pair.adapted), pixels(pair.base))


def test_it_trains_unet_and_text_encoder(pipe, tmp_path):
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    kind = family(pipe)
    tuned = veneer.attach(pipe, "lora", where=["xattn.{q,k,v,out}", "text/attn.*"], rank=2)
    save(tmp_path / "a.png", 160, 160)
    data = PhotoDataset(find_photos(tmp_path), kind.resolution, kind.multiple, 0, captions=Captions("duck"))
    step = DenoisingLoss(kind, data, 0, 2, ObjectiveOptions(weighting="min_snr"))
    assert step.text_trains
    step(0, [0, 1]).backward()
    ups = {name: p for name, p in tuned.named_parameters() if name.endswith("up")}
    assert {name for name, p in ups.items() if p.grad is None or not p.grad.any()} == set()


def test_a_prompt_of_more_than_24_tokens(pipe):
    words = " ".join(["duck"] * LENGTH)
    with raises(PromptError, given=26, expected=24, where="duck duck"):
        family(pipe).encode_text([words])
    fits = " ".join(["duck"] * (LENGTH - 2))
    assert family(pipe).encode_text([fits])["prompt_embeds"].shape == (1, LENGTH, 128)

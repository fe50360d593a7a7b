"""The loss of a batch against an explicit loop over its samples, by the papers' formulas with the pipeline's components."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import veneer
from tests.training.images import save
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.captions import Captions
from veneer.training.data.dataset import PhotoDataset, find_photos
from veneer.training.data.latent_cache import Cache
from veneer.training.families import family
from veneer.training.loop.seeds import generator
from veneer.training.objective.denoising_loss import DenoisingLoss, LossOptions
from veneer.training.objective.forward_passes import ForwardPasses
from veneer.training.objective.losses import prior_preservation
from veneer.training.objective.noise import NoiseOptions
from veneer.training.objective.objectives import ObjectiveOptions

SEED, T, GAMMA = 11, 1000, 5.0


@pytest.fixture(scope="module")
def kinds():
    """Families of frozen tiny pipelines."""
    found = {name: family(tiny_pipeline(name)) for name in ("sd", "sd2", "sd3", "dit")}
    for kind in found.values():
        for part in (kind.tower, kind.pipe.vae, *kind.text_towers.values()):
            part.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("photos")
    for i in range(3):
        save(place / f"{i}.png", 40, 40, i)
    return place


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("class")
    for i in range(2):
        save(place / f"{i}.png", 32, 32, 20 + i)
    return place


def made(kind, folder, samples=2, captions=None, prior=None, **options):
    """A `DenoisingLoss` at 32×32 pixels; `dataset` options go to the dataset."""
    told = options.pop("dataset", {})
    data = PhotoDataset(
        find_photos(folder),
        32,
        kind.multiple,
        SEED,
        captions=captions or Captions("a red dog", prior="a dog"),
        prior_photos=find_photos(prior, is_prior=True) if prior else (),
        **told,
    )
    return DenoisingLoss(kind, data, SEED, samples, **options)


# one sample, written out


def alphas():
    """ᾱ of the tiny Stable Diffusion schedules: √β linear."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, T) ** 2
    return torch.cumprod(1 - beta, 0)


def latents_of(pipe, step, example):
    posterior = pipe.vae.encode(example.pixels[None]).latent_dist
    n = torch.randn(posterior.mean.shape, generator=generator(SEED, "latents", step, example.index))
    z = posterior.mean + posterior.logvar.mul(0.5).exp() * n
    return (z - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor


def noise_of(step, example, shape):
    return torch.randn(shape, generator=generator(SEED, "noise", step, example.index))[None]


def sd_sample(pipe, step, example, prediction):
    """(prediction, target, min-SNR weight) of one sample of Stable Diffusion 1 (ε) or 2 (v)."""
    x0 = latents_of(pipe, step, example)
    eps = noise_of(step, example, x0.shape[1:])
    u = torch.rand((), generator=generator(SEED, "timestep", step, example.index), dtype=torch.float64).item()
    t = int(u * T)
    a = alphas()[t]
    noisy = a**0.5 * x0 + (1 - a) ** 0.5 * eps
    embeds = pipe.encode_prompt([example.caption], "cpu", 1, False)[0]
    said = pipe.unet(noisy, t, encoder_hidden_states=embeds).sample
    snr = float(a / (1 - a))
    if prediction == "epsilon":
        return said, eps, min(snr, GAMMA) / snr
    return said, a**0.5 * eps - (1 - a) ** 0.5 * x0, min(snr, GAMMA) / (snr + 1)


def sd3_sample(pipe, step, example):
    """(prediction, target, cosmap weight) of one sample of SD3: σ from logit-normal, shifted by 3."""
    x0 = latents_of(pipe, step, example)
    eps = noise_of(step, example, x0.shape[1:])
    z = torch.randn((), generator=generator(SEED, "timestep", step, example.index), dtype=torch.float64).item()
    u = 1 / (1 + np.exp(-z))
    sigma = 3 * u / (1 + 2 * u)
    embeds, _, pooled, _ = pipe.encode_prompt(example.caption, None, None, do_classifier_free_guidance=False)
    said = pipe.transformer(
        hidden_states=(1 - sigma) * x0 + sigma * eps,
        timestep=torch.tensor([sigma * T], dtype=torch.float32),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
    ).sample
    return said, eps - x0, 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))


@pytest.mark.parametrize(
    ("name", "weighting", "sample"),
    [
        ("sd", "min_snr", lambda *a: sd_sample(*a, "epsilon")),
        ("sd2", "min_snr", lambda *a: sd_sample(*a, "v_prediction")),
        ("sd3", "cosmap", sd3_sample),
    ],
)
@torch.no_grad()
def test_the_loss_is_the_mean_of_an_explicit_loop(kinds, folder, name, weighting, sample):
    kind = kinds[name]
    loss = made(kind, folder, 3, objective_options=ObjectiveOptions(weighting=weighting))
    for step in (0, 4):
        expected = []
        for example in loss.dataset.examples(step, 3):
            said, target, weight = sample(kind.pipe, step, example)
            expected.append(weight * ((said - target) ** 2).mean())
        assert float(loss(step, [0, 1, 2])) == pytest.approx(float(sum(expected) / 3), rel=1e-4)


@torch.no_grad()
def test_input_perturbation_affects_the_model_input_and_not_the_target(kinds, folder):
    kind = kinds["sd"]
    loss = made(kind, folder, 1, noise=NoiseOptions(perturbation=0.3))
    (example,) = loss.dataset.examples(2, 1)
    x0 = latents_of(kind.pipe, 2, example)
    draws = generator(SEED, "noise", 2, example.index)
    eps, xi = (torch.randn(x0.shape[1:], generator=draws)[None] for _ in range(2))
    u = torch.rand((), generator=generator(SEED, "timestep", 2, example.index), dtype=torch.float64).item()
    a = alphas()[int(u * T)]
    noisy = a**0.5 * x0 + (1 - a) ** 0.5 * (eps + 0.3 * xi)
    embeds = kind.pipe.encode_prompt([example.caption], "cpu", 1, False)[0]
    said = kind.pipe.unet(noisy, int(u * T), encoder_hidden_states=embeds).sample
    assert float(loss(2, [0])) == pytest.approx(float(((said - eps) ** 2).mean()), rel=1e-4)


# class images


@torch.no_grad()
def test_class_images_add_lambda_times_their_own_mean(kinds, folder, class_folder):
    loss = made(kinds["sd"], folder, 2, prior=class_folder, options=LossOptions(prior_weight=0.3))
    examples = loss.dataset.examples(1, 2)
    assert [(e.is_prior, e.caption) for e in examples] == [(False, "a photo of a red dog")] * 2 + [(True, "a dog")] * 2
    each = []
    for example in examples:
        said, target, _ = sd_sample(kinds["sd"].pipe, 1, example, "epsilon")
        each.append(float(((said - target) ** 2).mean()))
    assert float(loss(1, [0, 1])) == pytest.approx((each[0] + each[1]) / 2 + 0.3 * (each[2] + each[3]) / 2, rel=1e-4)
    assert float(loss(1, [1])) == pytest.approx(each[1] + 0.3 * each[3], rel=1e-4)


@torch.no_grad()
def test_a_micro_batch_equals_its_rows_of_the_whole_batch(kinds, folder, class_folder):
    loss = made(kinds["sd2"], folder, 4, prior=class_folder, dataset={"crop": "random", "flip": 0.5})
    batch = loss.dataset.examples(3, 4)
    rows = loss.losses(3, [batch[2], batch[3], batch[6], batch[7]])
    assert torch.equal(loss(3, [2, 3]), prior_preservation(rows, torch.tensor([False, False, True, True])))


@torch.no_grad()
def test_parts_of_a_batch_average_to_the_whole(kinds, folder, class_folder):
    """So accumulation and several processes give what one batch gives."""
    loss = made(kinds["sd2"], folder, 4, prior=class_folder)
    whole = loss(3, range(4))
    parts = [loss(3, [0, 1]), loss(3, [2, 3])]
    assert float(whole) == pytest.approx(float(sum(parts) / 2), rel=1e-5)


# masks


@pytest.fixture
def masked_folder(tmp_path):
    """One image with a mask whose edge lies inside a latent's 4×4 pixels, one without."""
    save(tmp_path / "a.png", 32, 32, 1)
    save(tmp_path / "b.png", 32, 32, 2)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :14] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize(("mean", "floor"), [("plain", 0.0), ("plain", 0.25), ("normalized", 0.25)])
def test_masked_loss(kinds, masked_folder, mean, floor):
    """Each latent counts by the share of its 4×4 pixels that the mask covers."""
    loss = made(kinds["sd"], masked_folder, 2, options=LossOptions(mask_mean=mean, mask_floor=floor))
    expected = []
    for example in loss.dataset.examples(0, 2):
        said, target, _ = sd_sample(kinds["sd"].pipe, 0, example, "epsilon")
        total = weight = 0.0
        for row in range(8):
            for column in range(8):
                share = 1.0
                if example.mask is not None:
                    share = float(example.mask[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean())
                share = floor + (1 - floor) * share
                total += share * float(((said - target)[0, :, row, column] ** 2).mean())
                weight += share if mean == "normalized" else 1.0
        expected.append(total / weight)
    assert float(loss(0, [0, 1])) == pytest.approx(sum(expected) / 2, rel=1e-4)


# captions


@torch.no_grad()
def test_a_dropped_caption_is_the_empty_prompt(kinds, folder):
    words = Captions("a red dog", dropout=0.5)
    loss = made(kinds["sd"], folder, 8, captions=words, cache=Cache())
    examples = loss.dataset.examples(0, 8)
    captions = [e.caption for e in examples]
    assert set(captions) == {"", "a photo of a red dog"}
    empty = [replace(e, caption="") for e in examples]
    dropped, all_empty = loss.losses(0, examples), loss.losses(0, empty)
    for caption, one, other in zip(captions, dropped, all_empty, strict=True):
        assert (float(one) == pytest.approx(float(other), rel=1e-5)) == (caption == "")


@torch.no_grad()
def test_everything_dropped_is_the_unconditional_loss(kinds, folder):
    dropped = made(kinds["sd"], folder, 2, captions=Captions("a red dog", dropout=1.0))
    example = dropped.dataset.examples(0, 1)[0]
    said, target, _ = sd_sample(kinds["sd"].pipe, 0, replace(example, caption=""), "epsilon")
    assert float(dropped(0, [0])) == pytest.approx(float(((said - target) ** 2).mean()), rel=1e-4)


# class labels


@torch.no_grad()
def test_a_class_label_in_place_of_text(kinds, folder):
    kind = kinds["dit"]
    pipe = kind.pipe
    beta = torch.linspace(pipe.scheduler.config.beta_start, pipe.scheduler.config.beta_end, T)
    a_bar = torch.cumprod(1 - beta, 0)
    for captions, label in ((Captions("duck", templates=("{concept}",)), 2), (Captions("duck", dropout=1.0), 1000)):
        loss = made(kind, folder, 1, captions=captions)
        (example,) = loss.dataset.examples(0, 1)
        x0 = latents_of(pipe, 0, example)
        eps = noise_of(0, example, x0.shape[1:])
        t = int(torch.rand((), generator=generator(SEED, "timestep", 0, example.index), dtype=torch.float64).item() * T)
        noisy = a_bar[t] ** 0.5 * x0 + (1 - a_bar[t]) ** 0.5 * eps
        said = pipe.transformer(noisy, timestep=torch.tensor([t]), class_labels=torch.tensor([label])).sample
        expected = float(((said[:, : x0.shape[1]] - eps) ** 2).mean())
        assert float(loss(0, [0])) == pytest.approx(expected, rel=1e-4)


# caches


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_cached_latents_and_text_change_nothing(kinds, folder, tmp_path, name):
    plain = made(kinds[name], folder, 2)
    kept = made(kinds[name], folder, 2, cache=Cache(tmp_path))
    for step in range(4):
        assert float(kept(step, [0, 1])) == pytest.approx(float(plain(step, [0, 1])), rel=1e-5)
    assert kept.cache.misses == 3 + 1, "three photos and one caption"
    again = made(kinds[name], folder, 2, cache=Cache(tmp_path))
    assert float(again(1, [0, 1])) == float(kept(1, [0, 1]))
    assert again.cache.misses == 0


def test_nothing_encodes_twice(kinds, folder):
    loss = made(kinds["sd"], folder, 2, cache=Cache())
    calls = []
    hooks = [
        part.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        for part in (kinds["sd"].pipe.vae.encoder, kinds["sd"].pipe.text_encoder)
    ]
    with torch.no_grad():
        for step in range(6):
            loss(step, [0, 1])
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["CLIPTextModel", "Encoder", "Encoder", "Encoder"]


@torch.no_grad()
def test_latents_of_random_crops_are_not_cached(kinds, folder):
    loss = made(kinds["sd"], folder, 2, cache=Cache(), dataset={"crop": "random"})
    loss(0, [0, 1])
    assert loss.cache.misses == 1, "the caption alone"


def test_a_text_encoder_that_trains_is_run_every_time(folder):
    pipe = tiny_pipeline("sd")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    kind = family(pipe)
    tuned = veneer.attach(pipe, "lora", where=["text/attn.*"], rank=2)
    loss = made(kind, folder, 2, cache=Cache())
    assert loss.text_trains
    loss(0, [0, 1]).backward()
    ups = [p for name, p in tuned.named_parameters() if name.endswith("up")]
    assert ups
    assert all(p.grad is not None and p.grad.any() for p in ups)
    before = float(loss(0, [0, 1]).detach())
    with torch.no_grad():
        for p in ups:
            p.fill_(0.5)
    assert float(loss(0, [0, 1]).detach()) != before


@torch.no_grad()
def test_cached_latents_of_a_bfloat16_run_equal_those_of_float32(kinds, folder, tmp_path):
    """Otherwise a shared cache folder would transfer the rounding of another run."""
    kind = kinds["sd"]
    with torch.autocast("cpu", torch.bfloat16):
        made(kind, folder, 1, cache=Cache(tmp_path))(0, [0])
    exact = made(kind, folder, 1, cache=Cache(tmp_path))
    assert float(exact(0, [0])) == float(made(kind, folder, 1, cache=Cache())(0, [0]))
    assert exact.cache.misses == 0


@torch.no_grad()
@pytest.mark.parametrize("change", ["length", "padding"])
def test_cached_text_depends_on_token_limit_and_padding(folder, change):
    """Pipelines that share an encoder's weights may differ in what they feed it: PixArt-α 120 tokens, PixArt-Σ 300."""
    cache = Cache()
    pipe = tiny_pipeline("sd3")
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        part.requires_grad_(False)
    made(family(pipe, max_tokens=12), folder, 1, cache=cache)(0, [0])
    assert cache.misses == 2, "the image and its caption"
    if change == "padding":
        pipe.tokenizer.pad_token = "red</w>"
    length = 10 if change == "length" else 12
    other = family(pipe, max_tokens=length)
    reused, anew = (made(other, folder, 1, cache=c) for c in (cache, Cache()))
    assert float(reused(0, [0])) == float(anew(0, [0]))
    assert cache.misses == 3, "the caption once more"


def test_randomness_depends_on_seed_step_and_sample_only(kinds, folder):
    loss = made(kinds["sd"], folder, 3)
    with torch.no_grad():
        torch.manual_seed(1)
        one = loss(2, [0, 1, 2])
        torch.manual_seed(2)
        loss(7, [0])
        assert torch.equal(loss(2, [0, 1, 2]), one)
        assert not torch.equal(loss(3, [0, 1, 2]), one)


def test_two_passes_share_noise_and_timestep_and_add_their_distance(kinds, folder, monkeypatch):
    """AdaMix on a DiT: loss + c · mean (second − first)², with other experts in the second pass only."""
    kind, calls = kinds["dit"], []
    tuned = veneer.attach(kind.pipe, "adamix", bottleneck=3, share_up=False, consistency=3.0)
    torch.manual_seed(0)
    for _, adapter in tuned.parts.values():
        adapter.train()
        for p in adapter.parameters():
            p.data += 0.3 * torch.randn_like(p)
    denoise = kind.denoise
    monkeypatch.setattr(kind, "denoise", lambda *inputs: calls.append((inputs, denoise(*inputs))) or calls[-1][1])
    loss = made(kind, folder, captions=Captions("duck", templates=("{concept}",)), passes=ForwardPasses([tuned], SEED))
    examples = loss.dataset.examples(0, 2)
    got = loss.losses(0, examples)
    (first, prediction), (second, other) = calls
    torch.testing.assert_close(first[:2], second[:2], rtol=0, atol=0)
    assert (prediction - other).abs().max() > 1e-4
    loss.passes = ForwardPasses()
    tuned.begin_pass(SEED, 0, 0)
    torch.testing.assert_close(got, loss.losses(0, examples) + 3 * ((prediction - other) ** 2).flatten(1).mean(1))
    tuned.detach()

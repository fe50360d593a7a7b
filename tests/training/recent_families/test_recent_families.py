"""Families of `language_model` against their real pipelines: text, denoiser, latents, objective, memory, images, commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle
from veneer.pipelines.generate import GenerateConfig, generate
from veneer.pipelines.personalize import PersonalizeConfig, personalize

import veneer
from tests.raising import raises
from tests.training.family_checks import assert_checkpointing_changes_no_gradient, assert_missing_components_are_named
from tests.training.images import save
from tests.training.test_memory_prediction import attach
from tests.training.transformer_families.test_transformer_families import recorded_steps
from veneer.injection.errors import BaseModelError, OptionError
from veneer.training.families import PromptError, family, generated_images
from veneer.training.families.family import Family
from veneer.training.families.flow.flux import unpack
from veneer.training.families.text_masks import with_mask
from veneer.training.objective.objectives import Flow
from veneer.training.preflight.memory_parts import count_training_step
from veneer.training.preflight.meta_family import meta_family
from veneer.training.prepare_base import enable_gradient_checkpointing
from veneer.training.report.previews import PreviewSettings, previews

from .tiny import PIPELINES, tiny

EVERY = list(PIPELINES)
SEQUENCES = ("ideogram4", "kandinsky5", "omnigen")
"""Families with other checks of text, denoiser and latents in `test_sequence_families`."""
NAMES = [name for name in EVERY if name not in SEQUENCES]
PROMPTS = ["a photo of a dog", "a red toy car on the 'beach'"]
HEIGHT, WIDTH = 32, 48
UNGUIDED: dict[str, dict[str, Any]] = {"hunyuan_image": {}}
"""Arguments of the pipelines without classifier-free guidance; `guidance_scale=1` for the others."""
OWN: dict[str, dict[str, Any]] = {
    "ernie_image": {"use_pe": False}, "prx": {"use_resolution_binning": False}, "ideogram4": {"guidance_schedule": (3.0, 3.0)},
}  # fmt: skip
"""Arguments with which the pipelines generate images of the size and prompt that are asked for."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # a call in Ideogram 4's pipeline
    pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning"),  # a base of PRX's pipeline
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of ERNIE-Image's noise levels
]
PipeOf = Callable[[str], Any]


def grid(latents: Tensor, kind: Family) -> Tensor:
    """Latents of the pipeline in any of their shapes as (batch, channels, height, width)."""
    if latents.ndim == 5:
        return latents[:, 0].permute(0, 3, 1, 2)
    if latents.ndim == 3:
        return unpack(latents, HEIGHT // kind.vae_factor, WIDTH // kind.vae_factor)
    return latents if latents.shape[1] == kind.latent_channels else pixel_shuffle(latents, 2)


def assert_denoise_is_the_loop(pipe: Any, name: str, **settings: Any) -> None:
    """The prediction that the scheduler gets in the pipeline's own loop of two steps, for its noise levels, with its sign."""
    kind = family(pipe)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    sizes = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent"}
    settings = sizes | UNGUIDED.get(name, {"guidance_scale": 1.0}) | OWN.get(name, {}) | settings
    with recorded_steps(pipe.scheduler) as steps, torch.no_grad():
        pipe(prompt=list(PROMPTS), generator=generators, **settings)
    levels = kind.objective().model_input(pipe.scheduler.sigmas[:2])
    assert len(steps) == 2
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
        for (prediction, _, noisy), level in zip(steps, levels, strict=True):
            ours = kind.denoise(grid(noisy, kind), level.expand(2), text)
            torch.testing.assert_close(ours, grid(prediction, kind), rtol=0, atol=1e-6)


# -- the denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_denoise_is_what_the_pipeline_does(pipe_of: PipeOf, name: str) -> None:
    assert_denoise_is_the_loop(pipe_of(name), name)


def test_guidance_is_an_input_of_distilled_hunyuan_image() -> None:
    assert_denoise_is_the_loop(tiny("hunyuan_image", guidance_embeds=True), "hunyuan_image", distilled_guidance_scale=3.5)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (8, 8)])
def test_hidream_in_training_mode_predicts_an_image(pipe_of: PipeOf, height: int, width: int) -> None:
    """Its transformer returns patches in training mode, which gradient checkpointing sets, with padding if it is no square."""
    kind = family(pipe_of("hidream"))
    noisy = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text, times = kind.encode_text(PROMPTS), torch.tensor([300.0, 800.0])
        expected = kind.denoise(noisy, times, text)
        kind.tower.training = True
        try:
            torch.testing.assert_close(kind.denoise(noisy, times, text), expected, rtol=0, atol=1e-6)
        finally:
            kind.tower.training = False


def test_hidream_rejects_an_image_with_more_patches_than_its_transformer_pads_to(pipe_of: PipeOf) -> None:
    """64 patches of 8×8 pixels; squares are not padded."""
    kind = family(pipe_of("hidream"))
    for height, width in ((72, 72), (32, 128)):
        assert kind.encode_images(torch.zeros(1, 3, height, width))[0].shape == (1, 4, height // 4, width // 4)
    with raises(OptionError, option="resolution", given=72, expected=64):
        kind.encode_images(torch.zeros(1, 3, 64, 72))


def test_mean_velocities_of_hunyuan_image_are_those_of_one_time() -> None:
    """The mean velocity from a time to itself is the velocity."""
    kind = family(tiny("hunyuan_image", use_meanflow=True))
    noisy, times = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0, 800.0])
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
        names = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "mask"}
        names |= {f"{name}_2": f"{key}_2" for name, key in names.items()}
        inputs = {name: text[key] for name, key in names.items()}
        expected, other = (kind.tower(noisy, times, **inputs, timestep_r=r, return_dict=False)[0] for r in (times, times / 2))
        assert torch.equal(kind.denoise(noisy, times, text), expected)
    assert not torch.allclose(expected, other)


# -- text -------------------------------------------------------------------------------------------------------------


def pipeline_text(pipe: Any, name: str, prompts: list[str]) -> dict[str, Tensor]:
    """Text by the pipeline's own `encode_prompt`."""
    if name == "ernie_image":
        return with_mask(pipe.encode_prompt(prompts, torch.device("cpu")))
    if name == "prx":
        embeds, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "mask": mask}
    if name == "hidream":
        embeds, _, llama, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "llama": llama.transpose(0, 1), "pooled": pooled}
    if name == "hunyuan_image":
        embeds, mask, glyphs, glyph_mask = pipe.encode_prompt(prompts, batch_size=len(prompts))
        return {"prompt_embeds": embeds, "mask": mask, "prompt_embeds_2": glyphs, "mask_2": glyph_mask}
    return {"prompt_embeds": pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]}


@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_the_pipeline(pipe_of: PipeOf, name: str) -> None:
    text, theirs = family(pipe_of(name)).encode_text(PROMPTS), pipeline_text(pipe_of(name), name, list(PROMPTS))
    for key, tensor in theirs.items():
        assert torch.equal(text[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_text_without_weights(pipe_of: PipeOf, name: str) -> None:
    kind = family(pipe_of(name))
    prompts = ["dog " * (kind.text_tokens - 1)] * 2 if name == "ernie_image" else PROMPTS
    real, shapes = kind.encode_text(prompts), kind.text_shapes(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}


def test_text_without_glyphs_has_the_dtype_of_the_text_encoder() -> None:
    """The pipeline's zeros for it are in float32, also beside text with glyphs."""
    kind = family(tiny("hunyuan_image").to(torch.bfloat16))
    with torch.no_grad():
        texts = [kind.encode_text(["a dog"]), kind.encode_text(PROMPTS)]
    shapes = kind.text_shapes(2)
    assert all({k: v.dtype for k, v in text.items()} == {k: v.dtype for k, v in shapes.items()} for text in texts)


LIMITS: dict[str, tuple[int, int]] = {
    "hunyuan_image": (200 + 34, 35), "ovis_image": (256 + 28, 34), "bria": (128, 1),
    "hidream": (128, 2), "ernie_image": (512, 1), "prx": (64, 1),
}  # fmt: skip
"""Limit of tokens, and tokens of the template."""


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_is_too_long(pipe_of: PipeOf, name: str) -> None:
    kind, (limit, template) = family(pipe_of(name)), LIMITS[name]
    longest = "a" + " dog" * (limit - template - 1)
    kind.check_length([longest])
    with raises(PromptError, given=limit + 8, expected=limit) as caught:  # the end of the template is cut off first
        kind.encode_text(["a dog", longest + " dog" * 7 + " toy"])
    *others, last = caught.value.where.split()
    assert (set(others), last) == ({"dog"}, "toy")
    assert kind.shorten(longest + " dog" * 8) == longest


def test_the_empty_caption_of_bria_is_zeros(pipe_of: PipeOf) -> None:
    """As the text of its pipeline without a negative prompt."""
    pipe = pipe_of("bria")
    _, negative, _ = pipe.encode_prompt(["a dog", "a toy"])
    text = family(pipe).encode_text(["a dog", ""])["prompt_embeds"]
    assert torch.equal(text[1], negative[1])
    assert text[0].any()


def test_glyphs_of_hunyuan_image_have_a_limit_of_their_own(pipe_of: PipeOf) -> None:
    """128 bytes with `Text "` before them and `". ` and an end token behind."""
    kind = family(pipe_of("hunyuan_image"))
    kind.encode_text(["a toy with '" + "x" * 118 + "'"])
    with raises(PromptError, given=129, expected=128):
        kind.encode_text(["a toy with '" + "x" * 119 + "'"])


def test_the_length_of_text_is_fixed(pipe_of: PipeOf) -> None:
    with raises(OptionError, option="max_tokens", given=32, expected=200):
        family(pipe_of("hunyuan_image"), max_tokens=32).encode_text(PROMPTS)


# -- images and objective ---------------------------------------------------------------------------------------------

FLUX_VAES = ("ovis_image", "bria", "hidream", "prx")
AFFINE = {"hunyuan_image": (0.75, 0.0), **dict.fromkeys(FLUX_VAES, (0.3611, 0.1159))}
"""Scale and shift of the latents."""


@pytest.mark.parametrize("name", AFFINE)
def test_latents_are_those_that_the_pipeline_decodes(pipe_of: PipeOf, name: str) -> None:
    vae, kind = pipe_of(name).vae, family(pipe_of(name))
    pixels = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = kind.encode_images(pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    scale, shift = AFFINE[name]
    torch.testing.assert_close(mean / scale + shift, posterior.mean)
    torch.testing.assert_close(std / scale, posterior.std)


def test_latents_of_ernie_image_are_those_that_its_pipeline_decodes(pipe_of: PipeOf) -> None:
    """With the batch norm's own constant of the pipeline, which is not that of the VAE's config."""
    pipe = pipe_of("ernie_image")
    pixels = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family(pipe).encode_images(pixels)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    norm, scale = pipe.vae.bn, torch.sqrt(pipe.vae.bn.running_var + 1e-5).view(1, -1, 1, 1)
    raw = pipe._unpatchify_latents(pipe._patchify_latents(mean) * scale + norm.running_mean.view(1, -1, 1, 1))
    torch.testing.assert_close(raw, posterior.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pipe._unpatchify_latents(pipe._patchify_latents(std) * scale), posterior.std)


def test_sizes_and_shifts(pipe_of: PipeOf) -> None:
    kinds = {name: family(pipe_of(name)) for name in NAMES}
    objectives = {name: kind.objective() for name, kind in kinds.items()}
    assert {type(objective) for objective in objectives.values()} == {Flow}
    assert {n: (k.vae_factor, k.multiple, k.resolution, k.latent_channels) for n, k in kinds.items()} == {
        "hunyuan_image": (4, 4, 256, 4),
        "ovis_image": (4, 8, 512, 4),
        "bria": (4, 8, 512, 4),
        "hidream": (4, 8, 40, 4),
        "ernie_image": (2, 4, 1024, 3),
        "prx": (4, 8, 64, 4),
    }
    assert {name: objective.shift for name, objective in objectives.items() if isinstance(objective, Flow)} == {
        "hunyuan_image": 5.0,
        "ovis_image": 1.0,
        "bria": 3.0,
        "hidream": 3.0,
        "ernie_image": 3.0,
        "prx": 3.0,
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_target_is_the_velocity_of_the_scheduler(pipe_of: PipeOf, name: str) -> None:
    """The scheduler's last step, with the target in place of the prediction, recovers x₀."""
    scheduler, objective = tiny(name).scheduler, family(pipe_of(name)).objective()
    scheduler.set_timesteps(4, **({"mu": 0.7} if scheduler.config.use_dynamic_shifting else {}))
    sigmas, t = scheduler.sigmas[-2].expand(3), scheduler.timesteps[-1]
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert objective.model_input(sigmas)[0] == pytest.approx(float(t), rel=1e-6)
    noisy = objective.add_noise(latents, noise, sigmas)
    clean = scheduler.step(objective.target(latents, noise, sigmas), t, noisy, return_dict=False)[0]
    torch.testing.assert_close(clean, latents, rtol=1e-5, atol=1e-5)


# -- components, memory and gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_missing_components_are_listed(pipe_of: PipeOf, name: str) -> None:
    assert_missing_components_are_named(pipe_of(name), name)


@pytest.mark.parametrize("name", EVERY)
def test_memory_of_a_step_without_weights(name: str, tmp_path: Path) -> None:
    """Counted from the configs of the base model alone."""
    tiny(name).save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    kind = meta_family(tmp_path, torch.float32)
    if name == "hidream":  # the number of tokens of each expert depends on the weights
        with raises(BaseModelError, where="memory", given="HiDreamImageTransformer2DModel"):
            count_training_step(kind, attach(kind.pipe), 32, 2, "no", flops=False)
        return
    assert count_training_step(kind, attach(kind.pipe), 32, 2, "no", flops=False).activations > 0


@pytest.mark.parametrize("name", EVERY)
def test_gradient_checkpointing_changes_no_gradient(pipe_of: PipeOf, name: str) -> None:
    assert_checkpointing_changes_no_gradient(family(pipe_of(name)), PROMPTS, ("blocks.", "layers."))


def test_experts_of_hidream_train_with_gradient_checkpointing() -> None:
    """They stop gradients in evaluation mode, except with the hooks of an attachment."""
    kind = family(tiny("hidream"))
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
    noisy = torch.randn(2, kind.latent_channels, 4, 6, generator=torch.Generator().manual_seed(0))
    lora = veneer.attach(kind.tower, "lora", rank=2, where=("attn.{q,v}", "mlp.{in,gate,out}"))
    with torch.no_grad():
        for i, parameter in enumerate(lora.parameters()):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_gradient_checkpointing(kind.tower)
        loss = kind.denoise(noisy, torch.tensor([300.0, 800.0]), text).square().mean()
        gradients.append(torch.autograd.grad(loss, list(lora.parameters())))
    assert all(gradient.any() for gradient in gradients[0])
    for plain, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-7)


# -- images and commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_generation_is_that_of_the_pipeline(pipe_of: PipeOf, name: str) -> None:
    pipe = pipe_of(name)
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": HEIGHT, "width": WIDTH}
    ours = family(pipe).generate(["a dog", "a toy"], [torch.Generator().manual_seed(i) for i in range(2)], **settings)
    generators, own = [torch.Generator().manual_seed(i) for i in range(2)], OWN.get(name, {})
    if family(pipe).single_prompt:
        calls = [pipe(prompt=p, generator=g, **settings, **own) for p, g in zip(("a dog", "a toy"), generators, strict=True)]
        theirs = [image for call in calls for image in generated_images(call)]
    else:
        theirs = generated_images(pipe(prompt=["a dog", "a toy"], generator=generators, **settings, **own))
    assert [image.size for image in ours] == [(WIDTH, HEIGHT)] * 2
    assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]


def test_previews_of_a_pipeline_with_a_single_prompt(pipe_of: PipeOf) -> None:
    """One call for each prompt, whatever the batch, with its own negative prompt."""
    settings = PreviewSettings(steps=1, batch=2, size=(HEIGHT, WIDTH), negative="a photo")
    several = previews(pipe_of("prx"), ["a dog", "a toy"], settings)
    single = [previews(pipe_of("prx"), [prompt], replace(settings, batch=1))[0] for prompt in ("a dog", "a toy")]
    assert [preview.image.size for preview in several] == [(WIDTH, HEIGHT)] * 2
    assert [preview.image.tobytes() for preview in several] == [preview.image.tobytes() for preview in single]


def latents(pipe: Any, **settings: Any) -> Tensor:
    """Latents that a family generates for a prompt in one step."""
    sizes = {"num_inference_steps": 1, "height": HEIGHT, "width": WIDTH, "output_type": "latent"}
    return torch.stack(family(pipe).generate(["a dog"], [torch.Generator().manual_seed(0)], **sizes, **settings))


def test_images_of_ernie_image_are_of_the_prompt_itself() -> None:
    """A prompt enhancer is not used; the text encoder in its place cannot generate."""
    pipe = tiny("ernie_image")
    expected = latents(pipe)
    pipe.register_modules(pe=pipe.text_encoder, pe_tokenizer=pipe.tokenizer)
    assert torch.equal(latents(pipe), expected)


def test_the_guidance_scale_of_hunyuan_image_is_that_of_distilled_models(pipe_of: PipeOf) -> None:
    distilled = tiny("hunyuan_image", guidance_embeds=True)
    assert not torch.allclose(latents(distilled, guidance_scale=1.0), latents(distilled, guidance_scale=8.0))
    assert torch.equal(latents(pipe_of("hunyuan_image"), guidance_scale=8.0), latents(pipe_of("hunyuan_image")))


SAVED = [name for name in EVERY if name != "prx"]
"""Families whose tiny pipelines load again: transformers reads the saved config of PRX's text encoder as one of another class."""


@pytest.mark.parametrize("name", SAVED)
def test_personalize_and_generate(name: str, tmp_path: Path) -> None:
    """Both commands on a saved pipeline: a loss of each step, and an image that the trained adapter changes."""
    tiny(name).save_pretrained(tmp_path / "base")
    (tmp_path / "photos").mkdir()
    save(tmp_path / "photos" / "0.png", 72, 64, seed=0)
    base, side = str(tmp_path / "base"), 32
    config = PersonalizeConfig(
        photos=tmp_path / "photos", base=base, out=tmp_path / "run", concept="toy", steps=2, resolution=side, eval="none",
        preview_steps=1, tracker="none", prompts=("a {concept}",), template=("a {concept}",), learning_rate=0.5,
    )  # fmt: skip
    run = personalize(config)
    training = json.loads((run / "result.json").read_text())["training"]
    assert training["steps"] == 2
    assert training["loss"] > 0
    images = []
    for adapters in ((), (str(run),)):
        settings: dict[str, Any] = {"base": base, "steps": 1, "size": (side, side), "guidance_scale": 1.0}
        settings["out"] = tmp_path / f"{len(adapters)}"
        images += [Image.open(path).tobytes() for path in generate(GenerateConfig(("a toy",), adapters, **settings))]
    assert len(images) == 2
    assert images[0] != images[1]

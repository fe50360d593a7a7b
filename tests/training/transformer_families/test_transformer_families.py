"""CogView4, AuraFlow, LongCat-Image and HunyuanDiT against their real pipelines: text, denoiser, latents, objective, images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from tests.raising import raises
from tests.training.family_checks import assert_checkpointing_changes_no_gradient, assert_missing_components_are_named
from tests.training.test_families import assert_same_inputs, recorded
from tests.training.test_memory_prediction import attach, real_step
from veneer.injection.errors import OptionError, UnsupportedSite
from veneer.training.families import PromptError, family
from veneer.training.families.family import Family
from veneer.training.families.flow.flux import unpack
from veneer.training.objective.objectives import Epsilon, Flow, ObjectiveOptions, VPrediction
from veneer.training.objective.timestep_sampling import shift_sigma_exponentially
from veneer.training.preflight.memory_parts import count_training_step, vae_bytes
from veneer.training.preflight.meta_family import meta_family
from veneer.training.preflight.step_cost import PeakBytes
from veneer.training.prepare_base import enable_gradient_checkpointing

from .tiny import PIPELINES, tiny

NAMES = list(PIPELINES)
FLOWS = [name for name in NAMES if name != "hunyuan_dit"]
PROMPTS = ["a photo of a dog", "a red toy car on the beach, 'xyz'"]
HEIGHT, WIDTH = 32, 48
PLAIN: dict[str, dict[str, Any]] = {
    "longcat_image": {"enable_prompt_rewrite": False}, "hunyuan_dit": {"use_resolution_binning": False},
}  # fmt: skip
"""Arguments with which the pipelines generate images of the size and prompt that are asked for."""


@contextmanager
def recorded_steps(scheduler: Any) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Context with (prediction, timestep, noisy latents) of each step of the scheduler."""
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    step = scheduler.step

    def keep(prediction: Tensor, timestep: Tensor, noisy: Tensor, **options: Any) -> Any:
        steps.append((prediction, timestep, noisy))
        return step(prediction, timestep, noisy, **options)

    scheduler.step = keep
    try:
        yield steps
    finally:
        del scheduler.step


def grid(latents: Tensor, kind: Family) -> Tensor:
    """Latents of the pipeline, packed or not, as (batch, channels, height, width)."""
    return latents if latents.ndim == 4 else unpack(latents, HEIGHT // kind.vae_factor, WIDTH // kind.vae_factor)


def sample(pipe: Any, name: str, scale: float = 1.0, **settings: Any) -> tuple[list[Any], list[Any]]:
    """(calls of the transformer, steps of the scheduler) in the pipeline's own loop of three steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    settings = (
        {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "output_type": "latent"} | PLAIN.get(name, {}) | settings
    )
    with recorded(pipe.transformer) as calls, recorded_steps(pipe.scheduler) as steps:
        pipe(prompt=list(PROMPTS), generator=generators, guidance_scale=scale, **settings)
    return calls, steps


def assert_denoise_is_the_loop(pipe: Any, name: str, sizes: Any = None, **settings: Any) -> None:
    """Inputs of the transformer for the scheduler's noise levels, and the prediction that the scheduler gets, with its sign."""
    kind = family(pipe)
    calls, steps = sample(pipe, name, **settings)
    assert len(calls) == len(steps) == 3
    levels = kind.objective().model_input(pipe.scheduler.sigmas[:3]) if name in FLOWS else pipe.scheduler.timesteps
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
        for (theirs, _), (prediction, _, noisy), level in zip(calls, steps, levels, strict=True):
            with recorded(kind.tower) as own:
                ours = kind.denoise(grid(noisy, kind), level.expand(2), text, sizes)
            if name == "cogview4":  # times from 1000 to 1 and noise levels from 1 to 0.0005, computed in float32
                times = own[0][0].pop("timestep"), theirs["timestep"]
                torch.testing.assert_close(*times, rtol=1e-5, atol=1e-3)
                own[0][0]["timestep"] = times[1]
            theirs = {k: v for k, v in theirs.items() if k not in ("attention_kwargs", "guidance")}
            angles = zip(own[0][0].pop("image_rotary_emb", ()), theirs.pop("image_rotary_emb", ()), strict=True)
            assert all(torch.equal(a, b) for a, b in angles)
            assert_same_inputs(own[0][0], theirs)
            torch.testing.assert_close(ours, grid(prediction, kind), rtol=0, atol=1e-5 if name == "cogview4" else 1e-6)


# -- the denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_denoise_is_what_the_pipeline_does(pipes: dict[str, Any], name: str) -> None:
    assert_denoise_is_the_loop(pipes[name], name)


@pytest.mark.parametrize("name", ["cogview4", "hunyuan_dit"])
def test_sizes_of_photos_are_inputs(pipes: dict[str, Any], name: str) -> None:
    sizes = [(50, 60, 3, 5, HEIGHT, WIDTH)] * 2
    assert_denoise_is_the_loop(pipes[name], name, sizes, original_size=(50, 60), crops_coords_top_left=(3, 5))


def test_rows_of_cogview4_with_texts_of_different_lengths_are_those_of_passes_alone(pipes: dict[str, Any]) -> None:
    """In the order of the batch; the transformer would read padding."""
    kind = family(pipes["cogview4"])
    rows = [kind.encode_text([prompt]) for prompt in ("a dog and " * 12, "a dog", "a toy and " * 12)]
    text = kind.join_text(rows)
    assert text["mask"].sum(dim=1).tolist() == [48, 16, 48]
    noisy = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    times, sizes = torch.tensor([300.0, 500.0, 800.0]), torch.tensor([(50 + i, 60, 3, 5, 32, 48) for i in range(3)])
    with torch.no_grad():
        alone = [kind.denoise(noisy[i : i + 1], times[i : i + 1], rows[i], sizes[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(kind.denoise(noisy, times, text, sizes), torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [{}, {"time_shift_type": "exponential"}, {"use_dynamic_shifting": False, "shift": 3.0}])
def test_times_of_cogview4_are_those_before_the_shift(shift: dict[str, Any]) -> None:
    assert_denoise_is_the_loop(tiny("cogview4", **shift), "cogview4")


# -- text -------------------------------------------------------------------------------------------------------------


def pipeline_text(pipe: Any, name: str, prompts: list[str]) -> dict[str, Tensor]:
    """Text by the pipeline's own `encode_prompt`."""
    if name == "longcat_image":
        return {"prompt_embeds": pipe.encode_prompt(prompts)[0]}
    if name == "hunyuan_dit":
        first, second = (pipe.encode_prompt(prompts, text_encoder_index=i, do_classifier_free_guidance=False) for i in (0, 1))
        return {"prompt_embeds": first[0], "mask": first[2], "prompt_embeds_t5": second[0], "mask_t5": second[2]}
    return {"prompt_embeds": pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]}


@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_the_pipeline(pipes: dict[str, Any], name: str) -> None:
    text, theirs = family(pipes[name]).encode_text(PROMPTS), pipeline_text(pipes[name], name, list(PROMPTS))
    for key, tensor in theirs.items():
        assert torch.equal(text[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_the_empty_caption_is_the_unconditional_text(pipes: dict[str, Any], name: str) -> None:
    negative = {"negative_prompt": ["", ""]} if name == "longcat_image" else {}
    calls, _ = sample(pipes[name], name, 3.0, **negative)
    inputs = calls[1 if name in ("cogview4", "longcat_image") else 0][0]  # the others join both branches, this one first
    text = family(pipes[name]).encode_text(["", ""])
    assert torch.equal(text["prompt_embeds"], inputs["encoder_hidden_states"][:2])
    if name == "hunyuan_dit":
        assert torch.equal(text["prompt_embeds_t5"], inputs["encoder_hidden_states_t5"][:2])
        assert torch.equal(text["mask_t5"], inputs["text_embedding_mask_t5"][:2])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_text_without_weights(pipes: dict[str, Any], name: str) -> None:
    kind = family(pipes[name], max_tokens={"cogview4": 30, "auraflow": 24}.get(name))
    prompts = ["dog " * 28] * 2 if name == "cogview4" else PROMPTS
    real, shapes = kind.encode_text(prompts), kind.text_shapes(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}


@pytest.mark.parametrize(("name", "limit"), [("cogview4", 30), ("auraflow", 24), ("longcat_image", 512), ("hunyuan_dit", 77)])
def test_a_prompt_that_is_too_long(pipes: dict[str, Any], name: str, limit: int) -> None:
    kind = family(pipes[name], max_tokens=limit if limit < 77 else None)
    added = {"cogview4": 2, "auraflow": 1, "hunyuan_dit": 2}.get(name, 0)  # tokens at the start and the end
    longest = "a" + " dog" * (limit - added - 1)
    kind.check_length([longest])
    with raises(PromptError, given=limit + 1, expected=limit):
        kind.encode_text(["a dog", longest + " dog"])
    with raises(PromptError, given=limit + 3, expected=limit) as caught:
        kind.encode_text([longest + " dog" * 3])
    assert set(caught.value.where.split()) == {"dog"}
    assert kind.shorten(longest + " dog dog") == longest


@pytest.mark.parametrize(("name", "tokens"), [("longcat_image", 512), ("hunyuan_dit", 256)])
def test_the_length_of_text_is_fixed(pipes: dict[str, Any], name: str, tokens: int) -> None:
    with raises(OptionError, option="max_tokens", given=64, expected=tokens):
        family(pipes[name], max_tokens=64).encode_text(PROMPTS)
    assert family(pipes[name], max_tokens=tokens).text_tokens == tokens


def test_tokens_of_quoted_text_are_counted_as_the_pipeline_makes_them(pipes: dict[str, Any]) -> None:
    pipe, kind = pipes["longcat_image"], family(pipes["longcat_image"])
    masks = []
    handle = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        kind.encode_text(["a 'toy dog'"])
    finally:
        handle.remove()
    template = pipe.tokenizer(pipe.prompt_template_encode_prefix + pipe.prompt_template_encode_suffix).input_ids
    assert len(kind._token_ids(["a 'toy dog'"], pipe.tokenizer)[0]) == int(masks[0].sum()) - len(template) == 11


@pytest.mark.parametrize("name", ["cogview4", "longcat_image"])
def test_token_embeddings_of_language_models_are_refused(pipes: dict[str, Any], name: str) -> None:
    with raises(UnsupportedSite, method="textual_inversion"):
        veneer.attach(pipes[name], "textual_inversion", tokens="<toy>", initialize="toy")


# -- images and objective ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_those_that_the_pipeline_decodes(pipes: dict[str, Any], name: str) -> None:
    vae, kind = pipes[name].vae, family(pipes[name])
    pixels = torch.rand(2, 3, 2 * kind.multiple, kind.multiple, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = kind.encode_images(pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    scale, shift = {"cogview4": (0.7, 0), "longcat_image": (0.3611, 0.1159)}.get(name, (0.13025, 0))
    torch.testing.assert_close(mean / scale + shift, posterior.mean)
    torch.testing.assert_close(std / scale, posterior.std)


@pytest.mark.parametrize("name", FLOWS)
def test_the_target_is_the_velocity_of_the_scheduler(pipes: dict[str, Any], name: str) -> None:
    """The scheduler's last step, with the target in place of the prediction, recovers x₀."""
    scheduler, objective = tiny(name).scheduler, family(pipes[name]).objective()
    assert isinstance(objective, Flow)
    scheduler.set_timesteps(4, **({} if name == "auraflow" else {"mu": 0.7}))
    sigmas, t = scheduler.sigmas[-2].expand(3), scheduler.timesteps[-1]
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert objective.model_input(sigmas)[0] == pytest.approx(float(t), rel=1e-6)
    noisy = objective.add_noise(latents, noise, sigmas)
    recovered = scheduler.step(objective.target(latents, noise, sigmas), t, noisy, return_dict=False)[0]
    torch.testing.assert_close(recovered, latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prediction", "kind"), [("epsilon", Epsilon), ("v_prediction", VPrediction)])
def test_the_target_of_hunyuan_dit_is_that_of_its_scheduler(prediction: str, kind: type) -> None:
    pipe = tiny("hunyuan_dit", prediction_type=prediction)
    objective = family(pipe).objective()
    assert type(objective) is kind
    latents, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([300])
    noisy = pipe.scheduler.add_noise(latents, noise, t)
    torch.testing.assert_close(objective.add_noise(latents, noise, t), noisy)
    original = pipe.scheduler.step(objective.target(latents, noise, t), 300, noisy).pred_original_sample
    torch.testing.assert_close(original, latents, rtol=1e-4, atol=1e-4)


def test_shifts_of_the_schedulers(pipes: dict[str, Any]) -> None:
    objectives = {name: family(pipes[name]).objective() for name in FLOWS}
    shifts = {name: (o.density, o.shift) for name, o in objectives.items() if isinstance(o, Flow)}
    assert shifts == {"cogview4": ("uniform", 1.0), "auraflow": ("uniform", 1.73), "longcat_image": ("uniform", 1.0)}


@pytest.mark.parametrize("kind", ["linear", "exponential"])
@pytest.mark.parametrize("tokens", [256, 4096])
def test_flux_shift_of_cogview4_is_that_of_its_pipeline(kind: str, tokens: int) -> None:
    from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

    pipe = tiny("cogview4", time_shift_type=kind)
    objective = family(pipe).objective(ObjectiveOptions(density="flux_shift"))
    pipe.scheduler.set_timesteps(sigmas=[0.9, 0.4], mu=calculate_shift(tokens))
    assert isinstance(objective, Flow)
    shifted = [shift_sigma_exponentially(sigma, objective.log_shift(tokens)) for sigma in (0.9, 0.4)]
    assert shifted == pytest.approx(pipe.scheduler.sigmas[:2].tolist(), rel=1e-5)


def test_sizes(pipes: dict[str, Any]) -> None:
    facts = {name: family(pipe) for name, pipe in pipes.items()}
    assert {n: (k.vae_factor, k.multiple, k.resolution, k.latent_channels) for n, k in facts.items()} == {
        "cogview4": (4, 8, 64, 4),
        "auraflow": (4, 8, 1024, 4),
        "longcat_image": (4, 8, 512, 16),
        "hunyuan_dit": (8, 16, 128, 4),
    }


# -- components, memory and generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_missing_components_are_listed(pipes: dict[str, Any], name: str) -> None:
    assert_missing_components_are_named(pipes[name], name)


@pytest.mark.parametrize("name", NAMES)
def test_counted_activations_are_those_of_a_real_step(name: str, tmp_path: Any) -> None:
    """Counted from the configs of the base model alone."""
    pipe = tiny(name)
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    shapes, kind = meta_family(tmp_path, torch.float32), family(pipe)
    assert vae_bytes(shapes, 32) == vae_bytes(kind, 32)
    trainable, without_weights = attach(pipe), attach(shapes.pipe)
    if name in ("cogview4", "auraflow"):
        kind.max_tokens = shapes.max_tokens = 16
    step = real_step(kind, trainable, 32, 2)
    with PeakBytes() as tracked:
        step()
    counted = count_training_step(shapes, without_weights, 32, 2, "no", flops=False).activations
    assert 0.99 * tracked.peak <= counted <= 1.01 * tracked.peak


@pytest.mark.parametrize("name", FLOWS)
def test_gradient_checkpointing_changes_no_gradient(pipes: dict[str, Any], name: str) -> None:
    assert_checkpointing_changes_no_gradient(
        family(pipes[name], max_tokens=24 if name == "auraflow" else None), PROMPTS, ("blocks.",)
    )


def test_hunyuan_dit_has_no_gradient_checkpointing(pipes: dict[str, Any]) -> None:
    with raises(OptionError, option="gradient_checkpointing", given="HunyuanDiT2DModel"):
        enable_gradient_checkpointing(pipes["hunyuan_dit"].transformer)


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_that_of_the_pipeline(pipes: dict[str, Any], name: str) -> None:
    pipe, prompts = pipes[name], ["a dog", "a toy"]
    settings = {"num_inference_steps": 2, "height": 32, "width": 48}
    ours = family(pipe).generate(prompts, [torch.Generator().manual_seed(i) for i in range(2)], **settings)
    negative = {"negative_prompt": ["", ""]} if name == "longcat_image" else {}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    theirs = pipe(prompt=["a dog", "a toy"], generator=generators, **settings, **PLAIN.get(name, {}), **negative).images
    assert [image.size for image in ours] == [(48, 32)] * 2
    assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]

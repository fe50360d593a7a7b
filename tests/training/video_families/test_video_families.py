"""Wan and HunyuanVideo on images against their real pipelines with one frame: text, denoiser, latents, experts, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from tests.raising import raises
from tests.training.family_checks import assert_missing_components_are_named
from tests.training.test_families import assert_same_inputs, recorded
from tests.training.test_memory_prediction import attach, real_step
from tests.training.transformer_families.test_transformer_families import recorded_steps
from veneer.injection.errors import BaseModelError
from veneer.training.families import PromptError, family
from veneer.training.families.video.wan import FlowWithin
from veneer.training.objective.objectives import Flow
from veneer.training.objective.validation_loss import fixed_timesteps
from veneer.training.preflight.memory_parts import count_training_step, vae_bytes
from veneer.training.preflight.meta_family import meta_family
from veneer.training.preflight.step_cost import PeakBytes
from veneer.training.prepare_base import enable_gradient_checkpointing, freeze

from .tiny import PIPELINES, tiny

NAMES = list(PIPELINES)
PROMPTS = ["a photo of a dog", "a red toy  car on the beach, 'xyz'"]
HEIGHT, WIDTH = 32, 48
TOKENS = {"hunyuan_video": 40}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' UniPC solver


def kind_of(pipe: Any, name: str, **options: Any) -> Any:
    return family(pipe, max_tokens=TOKENS.get(name, 24), **options)


# -- the denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_denoise_is_what_the_pipeline_does(pipes: dict[str, Any], name: str) -> None:
    """Inputs of the transformers, and the prediction that the scheduler gets, with its sign; both experts of Wan 2.2."""
    pipe, kind = pipes[name], kind_of(pipes[name], name, guidance=1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    towers = [tower for tower in (pipe.transformer, pipe.components.get("transformer_2")) if tower is not None]
    with recorded_steps(pipe.scheduler) as steps, recorded(towers[0]) as high, recorded(towers[-1]) as low:
        pipe(
            prompt=list(PROMPTS), generator=generators, guidance_scale=1.0, height=HEIGHT, width=WIDTH, num_frames=1,
            num_inference_steps=3, output_type="latent", max_sequence_length=TOKENS.get(name, 24),
        )  # fmt: skip
    calls = high + low if name == "wan_experts" else high
    boundary = sum(t >= 875 for t in pipe.scheduler.timesteps.tolist())
    assert 0 < boundary < 3
    assert [len(high), len(low)] == ([boundary, 3 - boundary] if name == "wan_experts" else [3, 3])
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
        for (theirs, _), (prediction, t, noisy) in zip(calls, steps, strict=True):
            with recorded(towers[0]) as first, recorded(towers[-1]) as second:
                ours = kind.denoise(noisy.squeeze(2), t.expand(2), text)
            assert_same_inputs((first or second)[0][0], {k: v for k, v in theirs.items() if k != "attention_kwargs"})
            torch.testing.assert_close(ours, prediction.squeeze(2), rtol=0, atol=1e-6)


def test_rows_of_a_batch_go_to_the_expert_of_their_noise_level(pipes: dict[str, Any]) -> None:
    pipe = pipes["wan_experts"]
    kind, noisy = kind_of(pipe, "wan"), torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    text = kind.encode_text([*PROMPTS, "a dog"])
    with recorded(pipe.transformer) as high, recorded(pipe.transformer_2) as low, torch.no_grad():
        together = kind.denoise(noisy, torch.tensor([874.0, 875.0, 300.0]), text)
    assert [call["timestep"].tolist() for call, _ in (*high, *low)] == [[875.0], [874.0, 300.0]]
    with torch.no_grad():
        for row, t in enumerate((874.0, 875.0, 300.0)):
            alone = {"prompt_embeds": text["prompt_embeds"][row : row + 1]}
            prediction = kind.denoise(noisy[row : row + 1], torch.tensor([t]), alone)
            torch.testing.assert_close(together[row : row + 1], prediction, rtol=0, atol=1e-6)


# -- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "low", "high"), [("dit/attn.q", 0.875, 1.0), ("dit_2/attn.q", 0.0, 0.874), ("dit*/attn.q", None, None)]
)
def test_noise_levels_are_those_of_the_experts_that_train(where: str, low: float | None, high: float | None) -> None:
    pipe = tiny("wan_experts")
    freeze(pipe)
    lora = veneer.attach(pipe, "lora", rank=2, where=where)
    kind = kind_of(pipe, "wan")
    objective = kind.objective()
    generators = [torch.Generator().manual_seed(seed) for seed in range(64)]
    levels = objective.sample_timesteps(generators)
    if low is None or high is None:
        assert type(objective) is Flow
        assert levels.min() < 0.5 < 0.875 < levels.max()
        return
    assert isinstance(objective, FlowWithin)
    assert low <= levels.min() < levels.max() <= high
    validation = fixed_timesteps(objective)
    assert low < validation.min() < validation.max() < high
    assert levels.max() - levels.min() > 0.9 * (high - low)
    assert objective.shift == 3.0
    noisy, text = torch.randn(2, 3, 8, 12), kind.encode_text(PROMPTS)
    for start in range(0, 64, 16):
        kind.denoise(noisy, objective.model_input(levels[start : start + 2]), text).square().mean().backward()
    assert all(adapter.up.grad is not None for _, adapter in lora.parts.values())


def test_an_expert_is_missing() -> None:
    pipe = tiny("wan_experts")
    pipe.transformer_2 = None
    with raises(BaseModelError, where="missing", given=("transformer_2",)):
        family(pipe)


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_text_is_that_of_the_pipeline(pipes: dict[str, Any], name: str) -> None:
    pipe, text = pipes[name], kind_of(pipes[name], name).encode_text(PROMPTS)
    if name == "wan":
        assert torch.equal(text["prompt_embeds"], pipe.encode_prompt(list(PROMPTS), max_sequence_length=24)[0])
        empty = kind_of(pipe, name).encode_text([""])["prompt_embeds"]
        assert torch.equal(empty, pipe.encode_prompt(["a"], max_sequence_length=24)[1])  # that of classifier-free guidance
        assert family(pipe).text_tokens == 512
    else:
        embeds, pooled, mask = pipe.encode_prompt(list(PROMPTS), max_sequence_length=40)
        for ours, theirs in zip((text["prompt_embeds"], text["pooled"], text["mask"]), (embeds, pooled, mask), strict=True):
            assert torch.equal(ours, theirs)
        assert family(pipe).text_tokens == 256


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_shapes_of_text_without_weights(pipes: dict[str, Any], name: str) -> None:
    kind = kind_of(pipes[name], name)
    real, shapes = kind.encode_text(PROMPTS), kind.text_shapes(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_tokens_are_counted_as_the_pipeline_makes_them(pipes: dict[str, Any], name: str) -> None:
    kind, masks = kind_of(pipes[name], name), []
    handle = pipes[name].text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(args[1] if len(args) > 1 else kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        kind.encode_text([PROMPTS[1]])
    finally:
        handle.remove()
    tokenizer, limit = next(kind.limits())
    assert len(kind._token_ids([PROMPTS[1]], tokenizer)[0]) == int(masks[0].sum()) <= limit == masks[0].shape[1]


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_a_prompt_that_is_too_long(pipes: dict[str, Any], name: str) -> None:
    kind = kind_of(pipes[name], name)
    limits = list(kind.limits())
    longest = kind.shorten("a" + " dog" * 200)
    kind.check_length([longest])
    with pytest.raises(PromptError) as caught:
        kind.encode_text([longest + " dog dog"])
    assert caught.value.given == caught.value.expected + 2
    assert caught.value.expected in [limit for _, limit in limits]
    assert "dog" in caught.value.where


# -- images and objective ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_latents_are_those_that_the_pipeline_decodes(pipes: dict[str, Any], name: str) -> None:
    vae, kind = pipes[name].vae, family(pipes[name])
    pixels = torch.rand(2, 3, 2 * kind.multiple, kind.multiple, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = kind.encode_images(pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels.unsqueeze(2)).latent_dist
    shift, spread = torch.zeros(1), torch.tensor(1 / 0.476986)
    if name == "wan":
        shift, spread = (torch.tensor(each).view(1, 3, 1, 1) for each in ([0.1, -0.2, 0.3], [2.0, 0.5, 1.5]))
    torch.testing.assert_close(mean * spread + shift, posterior.mean[:, :, 0])
    torch.testing.assert_close(std * spread, posterior.std[:, :, 0])


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_the_target_is_the_velocity_of_the_scheduler(name: str) -> None:
    """The scheduler's last step, with the target in place of the prediction, recovers x₀."""
    pipe = tiny(name)
    objective, scheduler = family(pipe).objective(), pipe.scheduler
    assert isinstance(objective, Flow)
    assert objective.shift == (3.0 if name == "wan" else 7.0)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(3)
    sigmas, t = scheduler.sigmas[-2].expand(3), scheduler.timesteps[-1]
    assert scheduler.sigmas[-1] == 0
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert objective.model_input(sigmas)[0] == pytest.approx(float(t), abs=1)  # UniPC's timesteps are integers
    noisy = objective.add_noise(latents, noise, sigmas)
    recovered = scheduler.step(objective.target(latents, noise, sigmas), t, noisy, return_dict=False)[0]
    torch.testing.assert_close(recovered, latents, rtol=1e-5, atol=1e-5)


def test_sizes(pipes: dict[str, Any]) -> None:
    facts = {name: family(pipe) for name, pipe in pipes.items()}
    assert {n: (k.vae_factor, k.multiple, k.resolution, k.latent_channels) for n, k in facts.items()} == {
        "wan": (4, 8, 480, 3),
        "wan_experts": (4, 8, 480, 3),
        "wan_5b": (4, 8, 480, 3),
        "hunyuan_video": (8, 16, 720, 5),
    }


# -- components, memory and generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_missing_components_are_listed(pipes: dict[str, Any], name: str) -> None:
    assert_missing_components_are_named(pipes[name], name)


@pytest.mark.parametrize("name", NAMES)
def test_counted_activations_are_those_of_a_real_step(name: str, tmp_path: Path) -> None:
    """Counted from the configs of the base model alone."""
    pipe = tiny(name)
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    shapes, kind = meta_family(tmp_path, torch.float32), family(pipe)
    assert vae_bytes(shapes, 32) == vae_bytes(kind, 32)
    trainable, without_weights = attach(pipe), attach(shapes.pipe)
    kind.max_tokens = shapes.max_tokens = TOKENS.get(name, 24)
    step = real_step(kind, trainable, 32, 2)
    with PeakBytes() as tracked:
        step()
    counted = count_training_step(shapes, without_weights, 32, 2, "no", flops=False).activations
    assert 0.97 * tracked.peak <= counted <= 1.03 * tracked.peak


@pytest.mark.parametrize("name", ["wan_experts", "hunyuan_video"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    pipe = tiny(name)
    kind, noisy = kind_of(pipe, name), torch.randn(2, pipe.transformer.config.in_channels, 4, 6)
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
    towers = [tower for tower in (pipe.transformer, pipe.components.get("transformer_2")) if tower is not None]
    weights = [w for tower in towers for n, w in tower.named_parameters() if "blocks." in n and w.ndim > 1]
    gradients: list[tuple[Tensor | None, ...]] = []
    for checkpointing in (False, True):
        if checkpointing:
            for tower in towers:
                enable_gradient_checkpointing(tower)
        loss = kind.denoise(noisy, torch.tensor([300.0, 900.0]), text).square().mean()
        gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
    assert all(gradient is not None for gradient in gradients[0]) or name == "hunyuan_video"
    for plain, recomputed in zip(*gradients, strict=True):
        if plain is not None and recomputed is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["wan_experts", "hunyuan_video"])
def test_generation_is_that_of_the_pipeline_with_one_frame(pipes: dict[str, Any], name: str) -> None:
    pipe, settings = pipes[name], {"num_inference_steps": 2, "height": 32, "width": 48}
    (ours,) = family(pipe).generate(["a dog"], [torch.Generator().manual_seed(0)], **settings)
    generators = [torch.Generator().manual_seed(0)]
    ((theirs,),) = pipe(prompt=["a dog"], generator=generators, num_frames=1, output_type="pil", **settings).frames
    assert ours.size == (48, 32)
    assert ours.tobytes() == theirs.tobytes()

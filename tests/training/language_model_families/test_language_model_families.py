"""Z-Image, Qwen-Image and Lumina 2 against their real pipelines: text, denoiser, latents, objective, memory and generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor

import veneer
from tests.raising import raises
from tests.training.family_checks import assert_missing_components_are_named
from tests.training.test_families import assert_same_inputs, recorded
from tests.training.test_memory_prediction import attach, real_step
from veneer.injection.errors import SelectionError, UnsupportedSite
from veneer.training import attach_methods
from veneer.training.families import PromptError, family
from veneer.training.families.errors import PromptWarning
from veneer.training.families.family import Family
from veneer.training.families.flow.flux import unpack
from veneer.training.objective.objectives import Flow, ObjectiveOptions
from veneer.training.objective.timestep_sampling import flux_mu
from veneer.training.preflight.memory_parts import count_training_step, vae_bytes
from veneer.training.preflight.meta_family import meta_family
from veneer.training.preflight.step_cost import PeakBytes

from .tiny import PIPELINES, tiny

NAMES = list(PIPELINES)
PROMPTS = ["a photo of a dog", "a red toy car on the beach, xyz"]
WITHOUT_GUIDANCE = {"z_image": 0.0, "qwen_image": 1.0, "lumina2": 1.0}
TOKENS = {"z_image": 13, "qwen_image": 15, "lumina2": 47}
"""Tokens of the first prompt with its template."""
HEIGHT, WIDTH = 32, 48


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


def sample(pipe: Any, scale: float, prompts: list[str] = PROMPTS, **settings: Any) -> tuple[list[Any], list[Any]]:
    """(calls of the transformer, steps of the scheduler) in the pipeline's own loop of two steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    settings |= {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent"}
    with recorded(pipe.transformer) as calls, recorded_steps(pipe.scheduler) as steps:
        pipe(prompt=list(prompts), generator=generators, guidance_scale=scale, **settings)
    return calls, steps


# -- the denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_denoise_is_what_the_pipeline_does(pipes: dict[str, Any], name: str) -> None:
    """Inputs of the transformer, and the prediction that the scheduler gets, with its sign."""
    pipe, kind = pipes[name], family(pipes[name])
    calls, steps = sample(pipe, WITHOUT_GUIDANCE[name])
    assert len(calls) == len(steps) == 2
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
        for (theirs, _), (prediction, t, noisy) in zip(calls, steps, strict=True):
            with recorded(kind.tower) as own:
                ours = kind.denoise(grid(noisy, kind), t.expand(2), text)
            if name == "z_image":
                for key in ("x", "cap_feats"):
                    assert all(torch.equal(a, b) for a, b in zip(own[0][0][key], theirs[key], strict=True))
                assert torch.equal(own[0][0]["t"], theirs["t"])
            else:
                inputs = {k: v for k, v in theirs.items() if k not in ("attention_kwargs", "img_shapes")}
                assert_same_inputs({k: v for k, v in own[0][0].items() if k != "img_shapes"}, inputs)
                assert own[0][0].get("img_shapes") == theirs.get("img_shapes")
            torch.testing.assert_close(ours, grid(prediction, kind), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["z_image", "lumina2"])
def test_the_empty_caption_is_the_unconditional_text(pipes: dict[str, Any], name: str) -> None:
    calls, _ = sample(pipes[name], 3.0, ["a dog"])
    text = family(pipes[name]).encode_text(["", "a dog"])
    if name == "z_image":
        assert torch.equal(text["prompt_embeds"][0, : text["mask"][0].sum()], calls[0][0]["cap_feats"][1])
    else:
        torch.testing.assert_close(text["prompt_embeds"][:1], calls[1][0]["encoder_hidden_states"])
        assert torch.equal(text["mask"][:1], calls[1][0]["encoder_attention_mask"])


@pytest.mark.parametrize(("scale", "calls"), [(1.0, 1), (3.0, 2), (None, 2)])
def test_guidance_of_qwen_image_is_its_true_cfg_scale(pipes: dict[str, Any], scale: float | None, calls: int) -> None:
    pipe = pipes["qwen_image"]
    settings: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2}
    with recorded(pipe.transformer) as own:
        (ours,) = family(pipe).generate(["a dog"], [torch.Generator().manual_seed(0)], guidance_scale=scale, **settings)
    assert len(own) == 2 * calls
    scale = 4.0 if scale is None else scale  # the pipeline's default
    settings |= {"true_cfg_scale": scale, "generator": [torch.Generator().manual_seed(0)]}
    (theirs,) = pipe(prompt=["a dog"], **({"negative_prompt": " "} if scale > 1 else {}), **settings).images
    assert ours.tobytes() == theirs.tobytes()


def test_a_negative_prompt_of_qwen_image_without_guidance_has_no_effect(pipes: dict[str, Any]) -> None:
    """At a scale of 1; the pipeline alone would apply its default, 4."""
    pipe = pipes["qwen_image"]
    settings: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0}
    with recorded(pipe.transformer) as calls:
        family(pipe).generate(["a dog"], [torch.Generator().manual_seed(0)], negative_prompt=["blurry"], **settings)
    assert len(calls) == 2


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_the_pipeline(pipes: dict[str, Any], name: str) -> None:
    pipe, kind = pipes[name], family(pipes[name])
    text = kind.encode_text(PROMPTS)
    if name == "z_image":
        rows, _ = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
        for row, embeds, mask in zip(rows, text["prompt_embeds"], text["mask"], strict=True):
            assert torch.equal(embeds[: len(row)], row)
            assert mask.tolist() == [1] * len(row) + [0] * (len(mask) - len(row))
            assert not embeds[len(row) :].any()
    else:
        options = {} if name == "qwen_image" else {"do_classifier_free_guidance": False}
        embeds, mask = pipe.encode_prompt(list(PROMPTS), **options)[:2]
        assert torch.equal(text["prompt_embeds"], embeds)
        assert torch.equal(text["mask"], mask)
    assert text["mask"][0].sum() == TOKENS[name]


@pytest.mark.parametrize("name", NAMES)
def test_rows_encoded_alone_make_the_same_batch(pipes: dict[str, Any], name: str) -> None:
    """As the cache of text embeddings does."""
    kind = family(pipes[name])
    together, alone = kind.encode_text(PROMPTS), kind.join_text([kind.encode_text([prompt]) for prompt in PROMPTS])
    assert together.keys() == alone.keys()
    assert torch.equal(alone["mask"], together["mask"])
    valid = together["mask"].bool()
    torch.testing.assert_close(alone["prompt_embeds"][valid], together["prompt_embeds"][valid])
    noisy = torch.randn(2, kind.latent_channels, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (kind.denoise(noisy, torch.tensor([300.0, 800.0]), text) for text in (together, alone))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_text_encoder(pipes: dict[str, Any], name: str) -> None:
    kind = family(pipes[name])
    table = kind.pipe.text_encoder.get_input_embeddings().weight
    text = kind.encode_text(["a photo of a dog"])
    prediction = kind.denoise(torch.zeros(1, kind.latent_channels, 4, 4), torch.tensor([500.0]), text)
    (gradient,) = torch.autograd.grad(prediction.square().sum(), table)
    dog, snow = (kind.pipe.tokenizer(" " + word, add_special_tokens=False).input_ids[-1] for word in ("dog", "snow"))
    assert gradient[dog].abs().sum() > 0
    assert gradient[snow].abs().sum() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_is_too_long(pipes: dict[str, Any], name: str) -> None:
    kind = family(pipes[name], max_tokens=TOKENS[name])
    ((_, limit),) = kind.limits()
    assert limit == TOKENS[name] + (34 if name == "qwen_image" else 0)
    kind.check_length([PROMPTS[0]])
    longer = PROMPTS[0] + " toy cat"
    with raises(PromptError, given=limit + 2, expected=limit):
        kind.encode_text(["a dog", longer])
    assert kind.shorten(longer) == PROMPTS[0]
    with pytest.warns(PromptWarning) as caught:
        cut = family(pipes[name], max_tokens=TOKENS[name], truncate="warn").encode_text([longer])
    assert cut["mask"].sum() == TOKENS[name]
    if name == "lumina2":  # the others cut the end of the chat template, too
        assert caught[0].message.where.split() == ["toy", "cat"]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_text_without_weights(pipes: dict[str, Any], name: str) -> None:
    kind = family(pipes[name], max_tokens=TOKENS[name])
    real, shapes = kind.encode_text([PROMPTS[0]] * 2), kind.text_shapes(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_language_models_do_not_train(name: str) -> None:
    pipe = tiny(name)
    with pytest.raises(UnsupportedSite):
        veneer.attach(pipe, "textual_inversion", tokens="<toy>", initialize="toy")
    with raises(SelectionError, pattern="text*/attn"):
        attach_methods.attach_all(pipe, attach_methods.build_methods("lora", {}, "<toy>", "toy"), {}, True, 0)


# -- images and objective ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_those_that_the_pipeline_decodes(pipes: dict[str, Any], name: str) -> None:
    vae, kind = pipes[name].vae, family(pipes[name])
    pixels = torch.rand(2, 3, 2 * kind.multiple, kind.multiple, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = kind.encode_images(pixels)
    assert mean.shape == std.shape == (2, kind.latent_channels, 2 * kind.multiple // kind.vae_factor, mean.shape[-1])
    with torch.no_grad():
        posterior = vae.encode(pixels.unsqueeze(2) if name == "qwen_image" else pixels).latent_dist
    if name == "qwen_image":
        shift, spread = (torch.tensor(each).view(1, 3, 1, 1) for each in ([0.1, -0.2, 0.3], [2.0, 0.5, 1.5]))
        torch.testing.assert_close(mean * spread + shift, posterior.mean[:, :, 0])
        torch.testing.assert_close(std * spread, posterior.std[:, :, 0])
    else:
        torch.testing.assert_close(mean / 0.3611 + 0.1159, posterior.mean)
        torch.testing.assert_close(std / 0.3611, posterior.std)


@pytest.mark.parametrize("name", NAMES)
def test_the_target_is_the_velocity_of_the_scheduler(pipes: dict[str, Any], name: str) -> None:
    """The scheduler's last step, with the target in place of the prediction, recovers x₀."""
    pipe, objective = tiny(name, shift_terminal=None), family(pipes[name]).objective()
    assert isinstance(objective, Flow)
    pipe.scheduler.set_timesteps(4, **({"mu": 0.7} if name == "qwen_image" else {}))
    sigmas, t = pipe.scheduler.sigmas[-2].expand(3), pipe.scheduler.timesteps[-1]
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert objective.model_input(sigmas)[0] == pytest.approx(float(t), rel=1e-6)
    noisy = objective.add_noise(latents, noise, sigmas)
    recovered = pipe.scheduler.step(objective.target(latents, noise, sigmas), t, noisy, return_dict=False)[0]
    torch.testing.assert_close(recovered, latents, rtol=1e-5, atol=1e-5)


def test_shifts_of_the_schedulers(pipes: dict[str, Any]) -> None:
    objectives = {name: family(pipe).objective() for name, pipe in pipes.items()}
    assert {name: (o.density, o.shift) for name, o in objectives.items() if isinstance(o, Flow)} == {
        "z_image": ("uniform", 3.0),
        "qwen_image": ("uniform", 1.0),
        "lumina2": ("uniform", 6.0),
    }
    by_size = family(pipes["qwen_image"]).objective(ObjectiveOptions(density="flux_shift"))
    assert isinstance(by_size, Flow)
    for tokens in (256, 1024, 4096):
        assert flux_mu(tokens, *by_size.mu) == pytest.approx(calculate_shift(tokens, 256, 8192, 0.5, 0.9))


def test_sizes(pipes: dict[str, Any]) -> None:
    facts = {name: family(pipe) for name, pipe in pipes.items()}
    assert {n: (k.vae_factor, k.multiple, k.resolution, k.latent_channels) for n, k in facts.items()} == {
        "z_image": (4, 8, 1024, 4),
        "qwen_image": (4, 8, 512, 3),
        "lumina2": (8, 16, 64, 4),
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
    kind.max_tokens = shapes.max_tokens = int(kind.encode_text(["a dog"])["mask"].sum())
    step = real_step(kind, trainable, 64, 2)
    with PeakBytes() as tracked:
        step()
    counted = count_training_step(shapes, without_weights, 64, 2, "no", flops=False).activations
    assert 0.999 * tracked.peak <= counted <= 1.001 * tracked.peak + rotary_bytes(kind.tower)


def rotary_bytes(tower: Any) -> int:
    """Tables of the rotary embedding, which the first forward pass allocates."""
    if hasattr(tower, "pos_embed"):  # Qwen-Image: of positive and negative positions, and for the 8×8 patches
        table = tower.pos_embed.pos_freqs
        return int(2 * table.nbytes + 64 * table[0].nbytes)
    tables = tower.rope_embedder.freqs_cis
    return sum(table.nbytes for table in tables) if isinstance(tower, ZImageTransformer2DModel) else 0


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_that_of_the_pipeline(pipes: dict[str, Any], name: str) -> None:
    pipe, prompts = pipes[name], ["a dog"]
    settings = {"num_inference_steps": 2, "height": 32, "width": 48, **({"guidance_scale": 0} if name == "z_image" else {})}
    alone = {"guidance_scale": 1} if name == "qwen_image" else {}  # the pipeline has no guidance without a negative prompt
    (ours,) = family(pipe).generate(prompts, [torch.Generator().manual_seed(0)], **settings, **alone)
    assert prompts == ["a dog"]
    (theirs,) = pipe(prompt=["a dog"], generator=[torch.Generator().manual_seed(0)], **settings).images
    assert ours.size == (48, 32)
    assert ours.tobytes() == theirs.tobytes()

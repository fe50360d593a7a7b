"""OmniGen, Ideogram 4 and Kandinsky 5 against their real pipelines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from tests.raising import raises
from tests.training.transformer_families.test_transformer_families import recorded_steps
from veneer import attach
from veneer.hosts.diffusers_dit import DiffusersDiT
from veneer.injection.errors import BaseModelError, OptionError
from veneer.testing.copies import cast_model
from veneer.training.families import PromptError, PromptWarning, families, family
from veneer.training.objective.objectives import Flow, ObjectiveOptions

from .tiny import tiny

PROMPTS = ["a photo of a dog", "a red toy car on the small beach"]
HEIGHT, WIDTH = 32, 48
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # a call in Ideogram 4's pipeline
PipeOf = Callable[[str], Any]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- OmniGen ----------------------------------------------------------------------------------------------------------


def omnigen_steps(pipe: Any, prompt: str, **settings: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(prediction, time, noisy latents) of two steps of the pipeline for a prompt."""
    sizes = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0}
    with recorded_steps(pipe.scheduler) as steps, torch.no_grad():
        pipe(prompt=[prompt], generator=[generator()], **sizes | settings)
    return steps


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_denoise_of_omnigen_is_what_the_pipeline_does(shift: float) -> None:
    """Prompts of different lengths are one batch here, and a call each in the pipeline. Its scheduler has 1 − σ and x₀ − ε."""
    pipe = tiny("omnigen", {"shift": shift})
    kind = family(pipe)
    steps = [omnigen_steps(pipe, prompt) for prompt in PROMPTS]
    levels = kind.objective().model_input(1 - pipe.scheduler.sigmas[:2])
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
        for i, level in enumerate(levels):
            noisy, predictions = (torch.cat([rows[i][part] for rows in steps]) for part in (2, 0))
            torch.testing.assert_close(kind.denoise(noisy, level.expand(2), text), -predictions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_target_of_omnigen_in_place_of_its_prediction_ends_at_the_clean_latents(shift: float) -> None:
    """Four steps of the pipeline's loop from noise, with the target of a pair of latents and noise at each of its times."""
    pipe = tiny("omnigen", {"shift": shift})
    kind = family(pipe)
    objective = kind.objective()
    latents, noise = torch.randn(2, 1, 4, 4, 6, generator=generator())
    times: list[float] = []

    def oracle(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        level = 1 - timestep[:1]
        times.append(float(objective.model_input(level)))
        expected = objective.add_noise(latents, noise, level)
        torch.testing.assert_close(hidden_states[:1], expected, rtol=0, atol=1e-6)
        return (-objective.target(latents, noise, level).expand_as(hidden_states),)

    pipe.transformer.forward = oracle
    settings = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "output_type": "latent", "guidance_scale": 2.5}
    ended = pipe(prompt=["a dog"], latents=noise, **settings).images
    torch.testing.assert_close(ended, latents, rtol=0, atol=1e-6)
    assert times == sorted(times, reverse=True)
    assert times[0] == 1000


def test_noise_levels_of_omnigen(pipe_of: PipeOf) -> None:
    """Logit-normal, at least a thousandth, though the scheduler has a single training timestep."""
    objective = family(pipe_of("omnigen")).objective()
    assert isinstance(objective, Flow)
    levels = objective.sample_timesteps([generator(seed) for seed in range(4000)])
    logits = torch.logit(levels)
    assert abs(logits.mean()) < 0.06
    assert abs(logits.std() - 1) < 0.04
    low = family(pipe_of("omnigen")).objective(ObjectiveOptions(logit_mean=-20.0, density="logit_normal"))
    assert low.sample_timestep(generator()) == 1 / 1000


def test_text_of_omnigen_is_that_of_the_pipeline(pipe_of: PipeOf) -> None:
    """The ids of each prompt alone, which the pipeline pads on the left to the length of its negative prompt."""
    pipe = pipe_of("omnigen")
    text = family(pipe).encode_text(PROMPTS)
    for prompt, ids, mask in zip(PROMPTS, text["input_ids"], text["mask"], strict=True):
        data = pipe.multimodal_processor([prompt], None, height=HEIGHT, width=WIDTH, use_img_cfg=False)
        length = int(mask.sum())
        assert torch.equal(ids[:length], data["input_ids"][0, -length:])
        assert data["position_ids"][0, -(length + 1 + 6) :].tolist() == [*range(length + 1 + 6)]
        assert not ids[length:].any()


def test_shapes_of_text_of_omnigen_without_weights(pipe_of: PipeOf) -> None:
    kind = family(pipe_of("omnigen"), truncate="warn", max_tokens=40)
    template = kind.encode_text([""])["mask"].shape[1]
    real, shapes = kind.encode_text(["dog " * (40 - template)] * 2), kind.text_shapes(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}


def test_a_prompt_of_omnigen_that_is_too_long(pipe_of: PipeOf) -> None:
    kind = family(pipe_of("omnigen"))
    template = kind.encode_text([""])["mask"].shape[1]
    longest = "dog" + " dog" * (512 - template - 1)
    assert kind.encode_text([longest])["mask"].sum() == 512
    with raises(PromptError, given=514, expected=512) as caught:
        kind.encode_text(["a dog", longest + " red toy"])
    assert caught.value.where.split() == ["red", "toy"]
    short = family(pipe_of("omnigen"), truncate="warn")
    with pytest.warns(PromptWarning):
        text = short.encode_text([longest + " red toy"])
    assert torch.equal(text["input_ids"], kind.encode_text([longest])["input_ids"])


def test_latents_of_omnigen_are_those_that_the_pipeline_decodes(pipe_of: PipeOf) -> None:
    vae, kind = pipe_of("omnigen").vae, family(pipe_of("omnigen"))
    pixels = torch.rand(2, 3, HEIGHT, WIDTH, generator=generator()) * 2 - 1
    mean, std = kind.encode_images(pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean / 0.13025, posterior.mean)
    torch.testing.assert_close(std / 0.13025, posterior.std)
    assert (kind.vae_factor, kind.multiple, kind.resolution) == (8, 16, 1024)
    with raises(OptionError, option="pixels", expected=16):
        kind.encode_images(pixels[..., :24])


# -- Ideogram 4 -------------------------------------------------------------------------------------------------------


def ideogram4_grid(tokens: Tensor) -> Tensor:
    """Packed latents of the pipeline as (batch, channels, height, width), as it unpacks them before the VAE."""
    patches = tokens.view(len(tokens), HEIGHT // 4, WIDTH // 4, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(len(tokens), -1, HEIGHT // 2, WIDTH // 2)


def test_denoise_of_ideogram4_is_what_the_pipeline_does(pipe_of: PipeOf) -> None:
    """Two prompts of different lengths, padded to 64 tokens; the scheduler gets ε − x₀."""
    pipe = pipe_of("ideogram4")
    kind = family(pipe)
    settings = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 64}
    with recorded_steps(pipe.scheduler) as steps, torch.no_grad():
        pipe(PROMPTS, generator=generator(), guidance_scale=1.0, guidance_schedule=None, **settings)
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
        levels = kind.objective().model_input(pipe.scheduler.sigmas[:2])
        for (prediction, _, noisy), level in zip(steps, levels, strict=True):
            ours = kind.denoise(ideogram4_grid(noisy), level.expand(2), text)
            torch.testing.assert_close(ours, ideogram4_grid(prediction), rtol=0, atol=1e-6)


def test_the_target_of_ideogram4_in_place_of_its_predictions_ends_at_the_clean_latents() -> None:
    """Both transformers of the pipeline's loop of four steps predict the target of a pair of latents and noise."""
    pipe = tiny("ideogram4")
    objective = family(pipe).objective()
    clean, noise = torch.randn(2, 1, 96, 12, generator=generator())

    def oracle(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        level = 1 - timestep
        expected = objective.add_noise(clean, noise, level)
        torch.testing.assert_close(hidden_states[:, -96:], expected, rtol=0, atol=2e-6)
        return (torch.nn.functional.pad(-objective.target(clean, noise, level), (0, 0, hidden_states.shape[1] - 96, 0)),)

    pipe.transformer.forward = pipe.unconditional_transformer.forward = oracle
    start = objective.add_noise(clean, noise, torch.tensor([9.0]).sigmoid())  # the first noise level of its schedule
    settings = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 64}
    ended = pipe(["a dog"], latents=start, guidance_scale=2.5, guidance_schedule=None, **settings).images
    torch.testing.assert_close(ended, clean, rtol=0, atol=2e-6)


def test_text_of_ideogram4_is_that_of_the_pipeline(pipe_of: PipeOf) -> None:
    """Without the padding before the prompt, and without the zeros of image tokens."""
    pipe = pipe_of("ideogram4")
    text = family(pipe).encode_text(PROMPTS)
    embeds, _, _, roles = pipe.encode_prompt(PROMPTS, 2, 3, 64, torch.device("cpu"))
    for i, length in enumerate(text["mask"].sum(dim=1).tolist()):
        assert (roles[i] == 3).sum() == length
        torch.testing.assert_close(text["prompt_embeds"][i, :length], embeds[i, 64 - length : 64], rtol=0, atol=1e-6)
        assert not text["prompt_embeds"][i, length:].any()


def test_latents_of_ideogram4_are_those_that_its_pipeline_decodes(pipe_of: PipeOf) -> None:
    """The batch norm's channels are ordered by place first: the pipeline's decoder gets the VAE's mean back."""
    pipe = tiny("ideogram4")
    pixels = torch.rand(1, 3, HEIGHT, WIDTH, generator=generator()) * 2 - 1
    mean, std = family(pipe).encode_images(pixels)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    packed = mean.view(1, 3, HEIGHT // 4, 2, WIDTH // 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 96, 12)
    decoded: list[Tensor] = []

    def decode(latents: Tensor, **_: Any) -> tuple[Tensor]:
        decoded.append(latents)
        return (pixels,)

    def still(hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.zeros_like(hidden_states),)

    pipe.vae.decode, pipe.transformer.forward, pipe.unconditional_transformer.forward = decode, still, still
    settings = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "max_sequence_length": 64, "guidance_schedule": None}
    pipe(["a dog"], latents=packed, guidance_scale=1.0, **settings)
    torch.testing.assert_close(decoded[0], posterior.mean, rtol=1e-5, atol=1e-6)
    variance = pipe.vae.bn.running_var.view(2, 2, 3).permute(2, 0, 1) + 1e-4
    torch.testing.assert_close(std * variance.sqrt().repeat(1, HEIGHT // 4, WIDTH // 4), posterior.std)


def test_a_prompt_of_ideogram4_that_is_too_long(pipe_of: PipeOf) -> None:
    kind = family(pipe_of("ideogram4"), max_tokens=32)
    template = int(kind.encode_text([""])["mask"].sum())
    longest = "a" + " dog" * (32 - template - 1)
    assert kind.encode_text([longest])["mask"].sum() == 32
    with raises(PromptError, given=34, expected=32) as caught:
        kind.encode_text(["a dog", longest + " red toy"])
    assert caught.value.where.split() == ["red", "toy"]
    short = family(pipe_of("ideogram4"), truncate="warn", max_tokens=32)
    with pytest.warns(PromptWarning):
        text = short.encode_text([longest + " red toy"])
    assert torch.equal(text["prompt_embeds"], kind.encode_text([longest])["prompt_embeds"])
    real, shapes = kind.encode_text([longest] * 2), kind.text_shapes(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}
    assert family(pipe_of("ideogram4")).text_tokens == 2048


def test_guidance_of_ideogram4() -> None:
    """The end of the pipeline's schedule, as long as the number of steps; a scale is that of all steps."""
    arguments = families()["ideogram4"].sampling_arguments
    schedules = {steps: arguments({"num_inference_steps": steps}, 1)["guidance_schedule"] for steps in (2, 5, 50)}
    assert schedules == {2: (3.0,) * 2, 5: (7.0,) * 2 + (3.0,) * 3, 50: (7.0,) * 47 + (3.0,) * 3}
    assert arguments({}, 1)["guidance_schedule"] == (7.0,) * 45 + (3.0,) * 3
    assert arguments({"guidance_scale": 4.0}, 1) == {"guidance_scale": 4.0, "guidance_schedule": None}


def test_the_unconditional_transformer_of_ideogram4_has_no_adapters(pipe_of: PipeOf) -> None:
    """By default and where sites are selected by role; its sites are those of the tower `dit_unconditional`."""
    pipe = tiny("ideogram4")
    for where in (None, "attn", "dit/attn.q"):
        lora = attach(pipe, "lora", where=where)
        assert {name.partition(".")[0] for name in lora.parts} == {"transformer"}
        lora.detach()
    both = attach(pipe, "lora", where=("dit/attn.q", "dit_unconditional/attn.q"))
    assert Counter(name.partition(".")[0] for name in both.parts) == {"transformer": 2, "unconditional_transformer": 2}


# -- Kandinsky 5 ------------------------------------------------------------------------------------------------------


def test_denoise_of_kandinsky5_is_what_the_pipeline_does(pipe_of: PipeOf) -> None:
    """Prompts of different lengths are one batch here, and a call each in the pipeline."""
    pipe = pipe_of("kandinsky5")
    kind = family(pipe)
    settings = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0}
    loops = []
    for prompt in PROMPTS:
        with recorded_steps(pipe.scheduler) as steps, torch.no_grad():
            pipe(prompt=[prompt], generator=[generator()], **settings)
        loops.append(steps)
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
        for i, level in enumerate(kind.objective().model_input(pipe.scheduler.sigmas[:2])):
            prediction, noisy = (torch.cat([steps[i][part][:, 0].permute(0, 3, 1, 2) for steps in loops]) for part in (0, 2))
            torch.testing.assert_close(kind.denoise(noisy, level.expand(2), text), prediction, rtol=0, atol=1e-6)


def test_the_target_of_kandinsky5_in_place_of_its_prediction_ends_at_the_clean_latents() -> None:
    pipe = tiny("kandinsky5")
    objective = family(pipe).objective()
    clean, noise = torch.randn(2, 1, 1, 4, 6, 4, generator=generator())

    def oracle(hidden_states: Tensor, timestep: Tensor, **_: Any) -> Any:
        level = timestep / objective.model_input(torch.ones(1))
        torch.testing.assert_close(hidden_states, objective.add_noise(clean, noise, level), rtol=0, atol=1e-6)
        return Transformer2DModelOutput(sample=objective.target(clean, noise, level))

    pipe.transformer.forward = oracle
    settings = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.5}
    torch.testing.assert_close(pipe(prompt=["a dog"], latents=noise, **settings).image, clean, rtol=0, atol=1e-6)


def test_text_of_kandinsky5_is_that_of_the_pipeline(pipe_of: PipeOf) -> None:
    """That of each prompt alone, without padding, and the pooled embedding of CLIP."""
    pipe = pipe_of("kandinsky5")
    text = family(pipe).encode_text(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        embeds, pooled, ends = pipe.encode_prompt([prompt])
        assert text["mask"][i].sum() == ends[1] == embeds.shape[1]
        assert torch.equal(text["prompt_embeds"][i, : ends[1]], embeds[0])
        assert torch.equal(text["pooled"][i], pooled[0])


def test_a_prompt_of_kandinsky5_that_is_too_long(pipe_of: PipeOf) -> None:
    """For the language model, within the template of which 40 tokens are dropped, and for CLIP."""
    kind = family(pipe_of("kandinsky5"), max_tokens=16)
    template = kind.encode_text([""])["mask"].shape[1]
    longest = "a" + " dog" * (16 - template - 1)
    assert kind.encode_text([longest])["mask"].sum() == 16
    with raises(PromptError, given=40 + 18, expected=40 + 16) as caught:
        kind.encode_text(["a dog", longest + " red toy"])
    assert caught.value.where.split() == ["toy"]  # the end of the template is cut off first
    real, shapes = kind.encode_text([longest] * 2), kind.text_shapes(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}
    whole = family(pipe_of("kandinsky5"))
    assert whole.text_tokens == 512
    with raises(PromptError, given=80, expected=77) as caught:
        whole.encode_text(["a" + " dog" * 75 + " red toy"])
    assert caught.value.where.split() == ["dog", "red", "toy"]


def test_latents_of_kandinsky5_are_those_that_its_pipeline_decodes(pipe_of: PipeOf) -> None:
    """Without the shift of the VAE's config."""
    pipe = tiny("kandinsky5")
    kind = family(pipe)
    pixels = torch.rand(1, 3, HEIGHT, WIDTH, generator=generator()) * 2 - 1
    mean, std = kind.encode_images(pixels)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    decoded: list[Tensor] = []

    def decode(latents: Tensor) -> Any:
        decoded.append(latents)
        return DecoderOutput(sample=pixels)

    def still(hidden_states: Tensor, **_: Any) -> Any:
        return Transformer2DModelOutput(sample=torch.zeros_like(hidden_states))

    pipe.vae.decode, pipe.transformer.forward = decode, still
    frames = mean.permute(0, 2, 3, 1).unsqueeze(1)
    pipe(["a dog"], latents=frames, height=HEIGHT, width=WIDTH, num_inference_steps=1, guidance_scale=1.0)
    torch.testing.assert_close(decoded[0], posterior.mean)
    torch.testing.assert_close(std / 0.3611, posterior.std)
    assert pipe.vae.config.shift_factor == 0.1159
    assert (kind.vae_factor, kind.multiple, kind.resolution, kind.latent_channels) == (8, 16, 1024, 4)


def test_latents_are_in_the_dtype_of_the_layer_that_reads_them() -> None:
    """In half precision diffusers keeps the embeddings of the time, the first parameters, in float32."""
    pipe = tiny("kandinsky5")
    cast_model(DiffusersDiT(), pipe.transformer, torch.bfloat16)
    kind = family(pipe)
    assert next(pipe.transformer.parameters()).dtype == torch.float32
    assert kind.cast(torch.ones(1)).dtype == torch.bfloat16


def test_models_of_kandinsky5_that_continue_frames_are_rejected() -> None:
    with raises(BaseModelError, where="transformer", given=9, expected=4):
        family(tiny("kandinsky5", visual_cond=True))

"""FLUX.2, Chroma, Sana and Krea 2 against their real pipelines: text, transformer inputs and outputs, latents, objective."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.raising import raises
from tests.training.test_families import assert_same_inputs, recorded
from veneer import attach
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.families import BaseModelError, PromptError, check_folder, families, family
from veneer.training.families.family import Family
from veneer.training.families.flow.flux import pack, unpack
from veneer.training.objective.objectives import Flow, ObjectiveOptions

from .tiny import PIPELINES, tiny

NAMES = list(PIPELINES)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' DPM solver
PROMPTS = ["a photo of a dog", "A red toy car on the beach, xyz"]
TOKENS = {"flux2": 80, "flux2_klein": 64, "chroma": 24, "sana": 24, "krea2": 24}
"""Token limits above those of the prompts with their templates, far below the defaults."""
SIDES = {"sana": (64, 96)}


def kind_of(pipe: Any, name: str, **options: Any) -> Family:
    return family(pipe, max_tokens=TOKENS[name], **options)


def loop(pipe: Any, name: str, guidance: float, steps: int = 2) -> tuple[list[tuple[dict[str, Any], Tensor]], Tensor]:
    """Calls of the transformer in the pipeline's own loop, and its timesteps."""
    height, width = SIDES.get(name, (24, 40))
    binning = {"use_resolution_binning": False} if name == "sana" else {}
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    with recorded(pipe.transformer) as calls:
        pipe(
            prompt=PROMPTS, height=height, width=width, guidance_scale=guidance, num_inference_steps=steps,
            generator=generators, output_type="latent", max_sequence_length=TOKENS[name], **binning,
        )  # fmt: skip
    return calls, pipe.scheduler.timesteps


@contextmanager
def recorded_ids(encoder: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Context with (token ids, attention mask) of each call of a text encoder."""
    batches: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        batches.append((args[0] if args else kwargs["input_ids"], kwargs["attention_mask"]))

    handle = encoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield batches
    finally:
        handle.remove()


def grid(tokens: Tensor, kind: Family) -> Tensor:
    """Packed tokens of the pipeline as latents (batch, channels, height, width)."""
    return tokens if tokens.ndim == 4 else unpack(tokens, 24 // kind.vae_factor, 40 // kind.vae_factor)


def assert_denoise_is_the_loop(pipe: Any, name: str, guidance: float) -> None:
    kind = kind_of(pipe, name, guidance=guidance)
    calls, timesteps = loop(pipe, name, guidance)
    assert len(calls) == 2
    with torch.no_grad():
        text = kind.encode_text(PROMPTS)
        for (theirs, raw), t in zip(calls, timesteps, strict=True):
            noisy = grid(theirs["hidden_states"], kind)
            with recorded(kind.tower) as own:
                prediction = kind.denoise(noisy, t.expand(2), text)
            assert_same_inputs(own[0][0], {k: v for k, v in theirs.items() if not k.endswith("attention_kwargs")})
            assert torch.equal(prediction, grid(raw, kind))


@pytest.mark.parametrize("name", NAMES)
def test_denoise_is_what_the_pipeline_does(pipes: dict[str, Any], name: str) -> None:
    assert_denoise_is_the_loop(pipes[name], name, {"flux2": 2.25, "krea2": 0.0}.get(name, 1.0))


def test_flux2_without_guidance() -> None:
    pipe = tiny("flux2", guidance_embeds=False)
    kind, text = kind_of(pipe, "flux2"), {"prompt_embeds": torch.zeros(1, 3, 24)}
    with recorded(pipe.transformer) as calls:
        kind.denoise(torch.zeros(1, 6, 4, 6), torch.tensor([500.0]), text)
    assert calls[0][0]["guidance"] is None


def test_sana_scales_timesteps() -> None:
    pipe = tiny("sana", timestep_scale=0.25, out_channels=16)
    calls, timesteps = loop(pipe, "sana", 1.0)
    kind = kind_of(pipe, "sana")
    with torch.no_grad():
        prediction = kind.denoise(calls[0][0]["hidden_states"], timesteps[:1].expand(2), kind.encode_text(PROMPTS))
    assert torch.equal(prediction, calls[0][1][:, :8])  # the other half is a variance


@pytest.mark.parametrize("name", ["flux2_klein", "chroma", "sana", "krea2"])
def test_the_empty_caption_is_the_unconditional_text(pipes: dict[str, Any], name: str) -> None:
    calls, _ = loop(pipes[name], name, 2.0, steps=1)
    inputs = calls[-1][0]
    own = kind_of(pipes[name], name).encode_text(["", ""])
    assert torch.equal(own["prompt_embeds"], inputs["encoder_hidden_states"][:2])
    if name in ("sana", "krea2"):
        assert torch.equal(own["mask"], inputs["encoder_attention_mask"][:2])
    if name == "chroma":
        assert torch.equal(own["mask"], inputs["attention_mask"][:, : TOKENS[name]])


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_text_encoder(pipes: dict[str, Any], name: str) -> None:
    kind = kind_of(pipes[name], name)
    table = kind.pipe.text_encoder.get_input_embeddings().weight
    embeds = kind.encode_text(["a photo of a dog"])["prompt_embeds"]
    (gradient,) = torch.autograd.grad(embeds.square().sum(), table)
    tokenizer = next(tokenizer for tokenizer, _ in kind.limits())
    dog, snow = (tokenizer(" " + word, add_special_tokens=False).input_ids[-1] for word in ("dog", "snow"))
    assert gradient[dog].abs().sum() > 0
    assert gradient[snow].abs().sum() == 0


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_counted_as_the_pipeline_makes_them(pipes: dict[str, Any], name: str) -> None:
    kind = kind_of(pipes[name], name)
    with recorded_ids(kind.pipe.text_encoder) as batches:
        kind.encode_text([PROMPTS[1]])
    ((ids, mask),) = batches
    ((tokenizer, limit),) = kind.limits()
    end = tokenizer(kind.pipe.prompt_template_encode_suffix).input_ids if name == "krea2" else []
    assert [*tokenizer(kind.prepare([PROMPTS[1]], tokenizer)).input_ids[0], *end] == ids[0][mask[0].bool()].tolist()
    assert ids.shape[1] == limit + len(end)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_is_too_long(pipes: dict[str, Any], name: str) -> None:
    kind = kind_of(pipes[name], name)
    ((_, limit),) = kind.limits()
    words = 1
    while kind._fits(" ".join(["dog"] * (words + 1))):
        words += 1
    longest = " ".join(["dog"] * words)
    kind.check_length([longest])
    with raises(PromptError, given=limit + 1, expected=limit):
        kind.encode_text(["a dog", longest + " dog"])
    with raises(PromptError, given=limit + 20, expected=limit) as caught:
        kind.encode_text([longest + " dog" * 20])
    assert set(caught.value.where.split()) == {"dog"}
    assert kind.shorten(longest + " dog dog") == longest


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_text_without_weights(pipes: dict[str, Any], name: str) -> None:
    kind = kind_of(pipes[name], name)
    real, shapes = kind.encode_text(PROMPTS), kind.text_shapes(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}


# -- images and objective ---------------------------------------------------------------------------------------------


def pixels_of(kind: Family) -> Tensor:
    shape = 2, 3, 2 * kind.multiple, kind.multiple
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", ["flux2", "flux2_klein"])
def test_latents_of_flux2_are_normalized_by_patch_channel(pipes: dict[str, Any], name: str) -> None:
    pipe, kind = pipes[name], family(pipes[name])
    pixels = pixels_of(kind)
    mean, std = kind.encode_images(pixels)
    with torch.no_grad():
        theirs = pipe._encode_vae_image(pixels, None) if name == "flux2" else pipes["flux2"]._encode_vae_image(pixels, None)
        posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(pipe._patchify_latents(mean), theirs, rtol=0, atol=1e-6)
    for channel in (0, 5):
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            variance = pipe.vae.bn.running_var[4 * channel + 2 * row + column] + 1e-4
            expected = posterior.std[:, channel, row::2, column::2] / variance.sqrt()
            torch.testing.assert_close(std[:, channel, row::2, column::2], expected)
    assert torch.equal(pack(mean), pipe._pack_latents(pipe._patchify_latents(mean)))


def test_latents_of_chroma(pipes: dict[str, Any]) -> None:
    pipe, kind = pipes["chroma"], family(pipes["chroma"])
    mean, std = kind.encode_images(pixels_of(kind))
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels_of(kind)).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.1159) * 0.3611)
    torch.testing.assert_close(std, posterior.std * 0.3611)


def test_latents_of_sana_have_no_noise(pipes: dict[str, Any]) -> None:
    pipe, kind = pipes["sana"], family(pipes["sana"])
    mean, std = kind.encode_images(pixels_of(kind))
    with torch.no_grad():
        expected = pipe.vae.encode(pixels_of(kind)).latent * 0.41407
    assert torch.equal(mean, expected)
    assert not std.any()
    assert torch.equal(kind.latents(mean, std, torch.Generator()), mean)


def test_latents_of_krea2(pipes: dict[str, Any]) -> None:
    pipe, kind = pipes["krea2"], family(pipes["krea2"])
    mean, std = kind.encode_images(pixels_of(kind))
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels_of(kind).unsqueeze(2)).latent_dist
    for channel, (center, spread) in enumerate(((0.1, 2.0), (-0.2, 0.5), (0.3, 1.5))):
        torch.testing.assert_close(mean[:, channel], (posterior.mean[:, channel, 0] - center) / spread)
        torch.testing.assert_close(std[:, channel], posterior.std[:, channel, 0] / spread)


@pytest.mark.parametrize("name", NAMES)
def test_the_target_is_the_velocity_of_the_scheduler(pipes: dict[str, Any], name: str) -> None:
    """The scheduler's last step, with the target in place of the prediction, recovers x₀."""
    pipe, objective = pipes[name], family(pipes[name]).objective()
    assert isinstance(objective, Flow)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4, **({} if name == "sana" else {"mu": 1.1}))
    sigma, t = scheduler.sigmas[-2], scheduler.timesteps[-1]
    assert scheduler.sigmas[-1] == 0
    latents, noise = torch.randn(2, 3, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = sigma.expand(3)
    noisy, target = objective.add_noise(latents, noise, sigmas), objective.target(latents, noise, sigmas)
    if name == "sana":
        scheduler.set_begin_index(3)
        assert objective.model_input(sigmas)[0].long() == t  # its timesteps are integers
    else:
        assert objective.model_input(sigmas)[0] == pytest.approx(float(t), rel=1e-6)
    recovered = scheduler.step(target, t, noisy, return_dict=False)[0]
    torch.testing.assert_close(recovered, latents, rtol=1e-5, atol=1e-5)


def test_shifts_and_densities(pipes: dict[str, Any]) -> None:
    objectives = {name: family(pipe).objective(ObjectiveOptions()) for name, pipe in pipes.items()}
    assert {n: (o.density, o.shift) for n, o in objectives.items() if isinstance(o, Flow)} == {
        "flux2": ("uniform", 1.0),
        "flux2_klein": ("uniform", 1.0),
        "chroma": ("uniform", 1.0),
        "sana": ("logit_normal", 3.0),
        "krea2": ("uniform", 1.0),
    }


@pytest.mark.parametrize(("name", "tokens", "mu"), [("flux2", 1024, 1.702), ("flux2_klein", 4096, 2.0234)])
def test_flux_shift_of_flux2_is_that_of_its_pipeline(pipes: dict[str, Any], name: str, tokens: int, mu: float) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    from veneer.training.objective.timestep_sampling import flux_mu

    objective = family(pipes[name]).objective(ObjectiveOptions(density="flux_shift"))
    assert isinstance(objective, Flow)
    assert flux_mu(tokens, *objective.mu) == pytest.approx(compute_empirical_mu(tokens, 50))
    assert flux_mu(tokens, *objective.mu) == pytest.approx(mu, abs=1e-3)


def test_flux_shift_of_krea2(pipes: dict[str, Any]) -> None:
    objective = family(pipes["krea2"]).objective()
    assert isinstance(objective, Flow)
    assert objective.mu == (0.5, 1.15, 256, 6400)
    pipe = tiny("krea2")
    pipe.register_to_config(is_distilled=True)
    objective = family(pipe).objective()
    assert isinstance(objective, Flow)
    assert objective.mu[:2] == (1.15, 1.15)


def test_sizes(pipes: dict[str, Any]) -> None:
    facts = {name: family(pipe) for name, pipe in pipes.items()}
    assert {n: (k.vae_factor, k.multiple, k.resolution, k.latent_channels) for n, k in facts.items()} == {
        "flux2": (2, 4, 256, 6),
        "flux2_klein": (2, 4, 256, 6),
        "chroma": (4, 8, 512, 6),
        "sana": (32, 32, 512, 8),
        "krea2": (4, 8, 1024, 3),
    }


# -- training and generation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(pipes: dict[str, Any], name: str) -> None:
    kind = kind_of(pipes[name], name)
    with torch.no_grad():
        text = kind.encode_text(["a dog", PROMPTS[1]])
    noisy = torch.randn(2, kind.latent_channels, 4, 6, generator=torch.Generator().manual_seed(0))
    blocks = [b for n, b in kind.tower.named_children() if n in ("single_transformer_blocks", "transformer_blocks")]
    weights = [w for b in blocks for w in b.parameters() if w.ndim > 1]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            kind.tower.enable_gradient_checkpointing()  # type: ignore[operator]
        kind.tower.train(checkpointing)
        try:
            loss = kind.denoise(noisy, torch.tensor([300.0, 800.0]), text).square().mean()
            gradients.append([loss, *torch.autograd.grad(loss, weights, allow_unused=True)])
        finally:
            kind.tower.disable_gradient_checkpointing()  # type: ignore[operator]
            kind.tower.eval()
    for plain, recomputed in zip(*gradients, strict=True):
        if plain is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_that_of_the_pipeline(pipes: dict[str, Any], name: str) -> None:
    pipe = pipes[name]
    settings = {"num_inference_steps": 1, "height": 32, "width": 64, "max_sequence_length": TOKENS[name]}
    if name == "sana":
        settings["use_resolution_binning"] = False
    ours = family(pipe).generate(["a dog"], [torch.Generator().manual_seed(0)], **settings)
    theirs = pipe(prompt=["a dog"], generator=[torch.Generator().manual_seed(0)], **settings).images
    assert ours[0].size == (64, 32)
    assert ours[0].tobytes() == theirs[0].tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_missing_components_are_listed(pipes: dict[str, Any], name: str) -> None:
    pipe = pipes[name]
    assert families()[name].matches(pipe)
    for part in family(pipe).needs:
        with raises(BaseModelError, where="missing", given=(part,)):
            family(type(pipe)(**{**pipe.components, part: None}))


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline", "QwenImageEditPipeline"])
def test_editing_pipelines_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with raises(BaseModelError, file=tmp_path, where="editing", given=name):
        check_folder(tmp_path)


def test_kontext_is_refused_and_its_base_model_is_not() -> None:
    base = tiny_pipeline("flux")
    with raises(BaseModelError, where="editing", given="FluxKontextPipeline"):
        family(diffusers.FluxKontextPipeline(**base.components))
    family(base)


def test_fill_weights_in_a_text_to_image_pipeline_are_refused() -> None:
    with raises(BaseModelError, where="transformer", given=96, expected=24):
        family(tiny_pipeline("flux", in_channels=96))


SD35 = {
    "medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "large": {"qk_norm": "rms_norm", "num_layers": 3},
}


@pytest.mark.parametrize("size", SD35)
def test_stable_diffusion_35(size: str) -> None:
    """Dual attention and normalized queries and keys: the family's call is the pipeline's, and LoRA reaches all attentions."""
    pipe = tiny_pipeline("sd3", **SD35[size])
    kind = family(pipe)
    with recorded(pipe.transformer) as calls:
        pipe(prompt=PROMPTS, height=24, width=40, guidance_scale=1.0, num_inference_steps=1, output_type="latent")
    ((inputs, raw),) = calls
    with torch.no_grad():
        prediction = kind.denoise(inputs["hidden_states"], inputs["timestep"], kind.encode_text(PROMPTS))
    assert torch.equal(prediction, raw)
    lora = attach(pipe, "lora", rank=2)
    kind.denoise(inputs["hidden_states"], inputs["timestep"], kind.encode_text(PROMPTS)).square().mean().backward()
    reached = {name.rpartition(".to_q")[0] for name, (_, adapter) in lora.parts.items() if adapter.up.grad.any()}
    attentions = {n for n, m in pipe.transformer.named_modules() if n.endswith((".attn", ".attn2"))}
    assert len(attentions) == 3
    assert {name.removeprefix("transformer.") for name in reached} - {""} == attentions

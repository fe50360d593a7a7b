"""Each family against its real pipeline: inputs and outputs of the denoiser in the pipeline's own loop."""

import inspect
import json
import shutil
from contextlib import contextmanager

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

from tests.raising import raises
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import FAMILIES, tiny_pipeline
from veneer.training import families as package
from veneer.training.families import BaseModelError, PromptError, check_folder, families, family
from veneer.training.families.errors import PromptWarning
from veneer.training.families.flow.flux import pack, positions, unpack
from veneer.training.objective.objectives import Epsilon, Flow, ObjectiveOptions, VPrediction

NAMES = list(FAMILIES)
PROMPTS = ["a photo of a dog", "a red toy car on the beach, xyz"]
SETTINGS = {
    "sd": {"height": 24, "width": 40, "guidance_scale": 1.0},
    "sd2": {"height": 24, "width": 40, "guidance_scale": 1.0},
    "sdxl": {"height": 24, "width": 40, "guidance_scale": 1.0},
    "sd3": {"height": 24, "width": 40, "guidance_scale": 1.0},
    "flux": {"height": 24, "width": 40, "guidance_scale": 2.25},
    "pixart": {"height": 64, "width": 96, "guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False},
    "dit": {"guidance_scale": 1.0},
}


@pytest.fixture(scope="module")
def pipes():
    return {name: tiny_pipeline(name) for name in NAMES}


def prompts_of(name):
    return ["duck", "3"] if name == "dit" else PROMPTS


def inputs_of(name):
    return {"class_labels": [2, 3]} if name == "dit" else {"prompt": PROMPTS}


@contextmanager
def recorded(tower):
    """(arguments by name, raw output) of every call of the denoiser."""
    calls = []

    def keep(module, args, kwargs, output):
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        calls.append((dict(bound), output[0] if isinstance(output, tuple) else output.sample))

    handle = tower.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def assert_same_inputs(ours, theirs):
    """Equal tensors by name; a scalar timestep equals one per row; missing equals None."""
    for name in set(ours) | set(theirs) - {"return_dict"}:
        a, b = ours.get(name), theirs.get(name)
        if name == "return_dict" or (not isinstance(b, torch.Tensor) and a is None and not b):
            continue
        if isinstance(b, dict):
            assert_same_inputs(a, b)
            continue
        if b.ndim == 0:
            b = b.expand(a.shape)
        assert a.shape == b.shape, name
        assert torch.equal(a, b.to(a.dtype)), name


def run(pipe, name, **extra):
    """The pipeline's own loop, two steps; (its calls, its timesteps)."""
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    with recorded(pipe.components.get("unet") or pipe.transformer) as calls:
        output = {} if name == "dit" else {"output_type": "latent"}
        pipe(**inputs_of(name), **SETTINGS[name], num_inference_steps=2, generator=generators, **output, **extra)
    return calls, pipe.scheduler.timesteps


def check(pipe, name, sizes=None, **extra):
    kind = family(pipe, guidance=SETTINGS[name]["guidance_scale"])
    with torch.no_grad():
        calls, timesteps = run(pipe, name, **extra)
        assert len(calls) == 2
        text = kind.encode_text(prompts_of(name))
        for (theirs, raw), t in zip(calls, timesteps, strict=True):
            noisy = theirs["sample" if "sample" in theirs else "hidden_states"]
            if name == "flux":
                noisy = pipe._unpack_latents(noisy, 24, 40, pipe.vae_scale_factor)
                raw = pipe._unpack_latents(raw, 24, 40, pipe.vae_scale_factor)
            with recorded(kind.tower) as own:
                got = kind.denoise(noisy, t.expand(2), text, sizes)
            assert_same_inputs(own[0][0], theirs)
            assert got.shape == noisy.shape
            assert torch.equal(got, raw[:, : noisy.shape[1]])


@pytest.mark.parametrize("name", NAMES)
def test_denoise_is_what_the_pipeline_does(pipes, name):
    sizes = [(24, 40, 0, 0, 24, 40)] * 2 if name == "sdxl" else None
    check(pipes[name], name, sizes)
    check(pipes[name], name)  # sizes default to those of the latents


def test_sdxl_is_conditioned_on_sizes(pipes):
    sizes = torch.tensor([(50, 60, 3, 5, 24, 40)] * 2)
    check(pipes["sdxl"], "sdxl", sizes, original_size=(50, 60), crops_coords_top_left=(3, 5), target_size=(24, 40))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_scaled_model_inputs_of_euler():
    pipe = tiny_pipeline("sdxl")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    check(pipe, "sdxl")


def test_pixart_with_sizes():
    pipe = tiny_pipeline("pixart", sample_size=128)
    check(pipe, "pixart")
    check(pipe, "pixart", [(900, 900, 7, 7, 64, 96)] * 2)  # only the target size is told
    with recorded(pipe.transformer) as calls:
        kind = family(pipe)
        kind.denoise(torch.zeros(2, 4, 8, 12), torch.zeros(2), kind.encode_text(PROMPTS))
    assert calls[0][0]["added_cond_kwargs"]["aspect_ratio"].tolist() == [[pytest.approx(64 / 96)]] * 2


def test_flux_without_guidance():
    check(tiny_pipeline("flux", guidance_embeds=False), "flux")


def test_sd3_without_t5():
    pipe = tiny_pipeline("sd3")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    assert list(family(pipe).text_towers) == ["text_encoder", "text_encoder_2"]
    check(pipe, "sd3")


def test_bfloat16_inputs_are_cast(pipes):
    for name in ("sd", "flux"):
        pipe = tiny_pipeline(name).to(torch.bfloat16)
        kind = family(pipe)
        channels = pipe.vae.config.latent_channels
        got = kind.denoise(torch.zeros(1, channels, 6, 10), torch.tensor([500]), kind.encode_text(["a dog"]))
        assert got.dtype == torch.bfloat16
        assert got.shape == (1, channels, 6, 10)


# -- packing ----------------------------------------------------------------------------------------------------------


def test_packing_by_hand(pipes):
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    tokens = pack(x)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                patch = [x[b, c, 2 * row + i, 2 * column + j].item() for c in range(3) for i in (0, 1) for j in (0, 1)]
                assert tokens[b, 3 * row + column].tolist() == patch
    assert torch.equal(unpack(tokens, 4, 6), x)
    theirs = pipes["flux"]._prepare_latent_image_ids(1, 2, 3, torch.device("cpu"), torch.float32)
    assert torch.equal(positions(2, 3).float(), theirs)


# -- text -------------------------------------------------------------------------------------------------------------


def own_encoding(pipe, name, prompts):
    """Output of the pipeline's `encode_prompt`, by the family's names."""
    no = {"do_classifier_free_guidance": False}
    if name in ("sd", "sd2"):
        return {"prompt_embeds": pipe.encode_prompt(prompts, "cpu", 1, False)[0]}
    if name == "sdxl":
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, prompts, **no)
    elif name == "sd3":
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, **no)
    elif name == "flux":
        embeds, pooled, _ = pipe.encode_prompt(prompts, prompts)
    else:
        embeds, mask, _, _ = pipe.encode_prompt(prompts, **no)
        return {"prompt_embeds": embeds, "mask": mask}
    return {"prompt_embeds": embeds, "pooled": pooled}


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dit"])
def test_text_equals_the_pipelines_own(pipes, name):
    prompts = [*PROMPTS, ""]
    ours, theirs = family(pipes[name]).encode_text(prompts), own_encoding(pipes[name], name, prompts)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert len(value) == 3
        assert torch.equal(value, theirs[key])
    alone = family(pipes[name]).encode_text([prompts[1]])
    for key, value in alone.items():
        torch.testing.assert_close(value[0], ours[key][1])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dit"])
def test_gradients_reach_every_text_encoder(name):
    pipe = tiny_pipeline(name)
    kind = family(pipe)
    text = kind.encode_text(["a photo of a dog"])
    sum(v.float().square().sum() for v in text.values() if v.is_floating_point()).backward()
    for tower_name, tower in kind.text_towers.items():
        table = tower.get_input_embeddings().weight
        tokenizer = getattr(pipe, tower_name.replace("text_encoder", "tokenizer"))
        dog, cat = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("dog", "cat"))
        assert table.grad[dog].abs().sum() > 0, tower_name
        assert table.grad[cat].abs().sum() == 0, tower_name


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dit"])
def test_a_prompt_that_is_too_long(pipes, name):
    pipe = pipes[name]
    tokens = {"max_tokens": 90} if name in ("sd3", "flux", "pixart") else {}
    limit = 90 if name == "pixart" else 77
    prompt = " ".join(["dog"] * 100)
    with raises(PromptError, expected=limit) as caught:
        family(pipe, **tokens).encode_text(["a dog", prompt])
    assert caught.value.given in (101, 102)
    assert set(caught.value.where.split()) == {"dog"}
    with pytest.warns(PromptWarning) as told:
        cut = family(pipe, truncate="warn", **tokens).encode_text([prompt])
    assert (caught.value.given, limit) in [(each.message.given, each.message.expected) for each in told]
    fits = " ".join(["dog"] * (limit - (1 if name == "pixart" else 2)))
    torch.testing.assert_close(cut["prompt_embeds"][:, :limit], self_limit(pipe, tokens, fits, name)[:, :limit])


def self_limit(pipe, tokens, prompt, name):
    if name in ("sd3", "flux"):  # T5 takes more than CLIP, and is cut later
        with pytest.warns(PromptWarning):
            return family(pipe, truncate="warn", **tokens).encode_text([prompt + " dog" * 40])["prompt_embeds"]
    return family(pipe, **tokens).encode_text([prompt])["prompt_embeds"]


def test_the_longest_prompt_that_fits_is_taken(pipes):
    family(pipes["sd"]).encode_text([" ".join(["dog"] * 75)])
    with raises(PromptError, given=78, expected=77):
        family(pipes["sd"]).encode_text([" ".join(["dog"] * 76)])


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_t5_length_can_be_chosen(pipes, name):
    default = {"sd3": 256, "flux": 512, "pixart": 120}[name]
    clip = 77 if name == "sd3" else 0
    for given, length in [(None, default), (20, 20)]:
        text = family(pipes[name], max_tokens=given).encode_text(["a dog"])
        assert text["prompt_embeds"].shape[1] == clip + length
    with raises(PromptError, expected=20):
        family(pipes[name], max_tokens=20).encode_text([" ".join(["dog"] * 30)])


def test_tokens_of_several_vectors_are_spelled_out():
    pipe = tiny_pipeline("sd")
    words = ["<toy>", "<toy>_1", "<toy>_2"]
    pipe.tokenizer.add_tokens(words)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    kind = family(pipe)
    got = kind.encode_text(["a <toy> in the snow"])["prompt_embeds"]
    single = [pipe.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("a", *words, "in", "the", "snow")]
    end = pipe.tokenizer.eos_token_id
    ids = torch.tensor([[pipe.tokenizer.bos_token_id, *single, *[end] * (77 - 1 - len(single))]])
    assert torch.equal(got, pipe.text_encoder(ids)[0])
    kind.encode_text(["<toy> " + " ".join(["dog"] * 72)])
    with raises(PromptError, given=78, expected=77):  # one word more, three vectors for one word
        kind.encode_text(["<toy> " + " ".join(["dog"] * 73)])


def test_dit_labels(pipes):
    kind = family(pipes["dit"])
    got = kind.encode_text(["goldfish", "Tinca tinca", "17", "", " duck "])["class_labels"]
    assert got.tolist() == [1, 0, 17, 1000, 2]
    assert got.dtype == torch.int64
    with raises(OptionError, option="prompt", given="goldfisch") as caught:
        kind.encode_text(["goldfisch"])
    assert "goldfish" in caught.value.expected
    with raises(OptionError, option="prompt", given="1001"):
        kind.encode_text(["1001"])
    with raises(OptionError, option="noisy", given=(8, 12)):
        kind.denoise(torch.zeros(1, 4, 8, 12), torch.zeros(1), {"class_labels": torch.zeros(1)})
    assert kind.text_towers == {}


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_images_become_scaled_latents(pipes, name):
    pipe, kind = pipes[name], family(pipes[name])
    side = 2 * kind.multiple
    pixels = torch.rand(2, 3, side, kind.multiple, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = kind.encode_images(pixels)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    config = pipe.vae.config
    shift = {"sd3": 0.0609, "flux": 0.1159}.get(name, 0.0)
    scale = {"sdxl": 0.13025, "sd3": 1.5305, "flux": 0.3611}.get(name, 0.18215)
    torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
    torch.testing.assert_close(std, posterior.std * scale)
    assert mean.shape == (2, config.latent_channels, side // kind.vae_factor, kind.multiple // kind.vae_factor)
    assert not mean.requires_grad
    # what the pipeline decodes is what was encoded
    torch.testing.assert_close(mean / config.scaling_factor + (config.shift_factor or 0), posterior.mean)
    one = kind.latents(mean[0], std[0], torch.Generator().manual_seed(3))
    torch.testing.assert_close(one, mean[0] + std[0] * torch.randn(mean[0].shape, generator=torch.Generator().manual_seed(3)))


def test_latent_means_and_stds_of_the_vae():
    pipe = tiny_pipeline("sdxl")
    m, s = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    pipe.vae.register_to_config(latents_mean=m, latents_std=s)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, std = family(pipe).encode_images(pixels)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    for c in range(4):
        torch.testing.assert_close(mean[:, c], (posterior.mean[:, c] - m[c]) * 0.13025 / s[c])
        torch.testing.assert_close(std[:, c], posterior.std[:, c] * 0.13025 / s[c])


def test_half_precision_vae_that_overflows_is_run_in_float32():
    pipe = tiny_pipeline("sdxl")
    pipe.vae.half()
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, _ = family(pipe).encode_images(pixels)
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}
    with torch.no_grad():
        exact = pipe.vae.float().encode(pixels).latent_dist.mean * 0.13025
    torch.testing.assert_close(mean, exact, rtol=0, atol=0)


def test_sides_must_divide(pipes):
    kind = family(pipes["sd"])
    assert kind.multiple == 8
    with raises(OptionError, option="pixels", given=(12, 16), expected=8):
        kind.encode_images(torch.zeros(1, 3, 12, 16))


def test_sizes_of_the_tiny_and_of_the_full_size_bases(pipes):
    facts = {name: (family(pipe).vae_factor, family(pipe).multiple, family(pipe).resolution) for name, pipe in pipes.items()}
    assert facts == {
        "sd": (4, 8, 32),
        "sd2": (4, 8, 32),
        "sdxl": (4, 8, 32),
        "sd3": (4, 8, 32),
        "flux": (4, 8, 512),
        "pixart": (8, 32, 256),
        "dit": (4, 8, 32),
    }


# -- objective --------------------------------------------------------------------------------------------------------


def test_objectives(pipes):
    kinds = {name: family(pipe).objective() for name, pipe in pipes.items()}
    assert {n: type(o) for n, o in kinds.items()} == {
        **dict.fromkeys(("sd", "sdxl", "pixart", "dit"), Epsilon),
        "sd2": VPrediction,
        "sd3": Flow,
        "flux": Flow,
    }
    assert kinds["sd3"].density == "logit_normal"
    assert kinds["sd3"].shift == 3.0
    assert (kinds["flux"].density, kinds["flux"].shift) == ("uniform", 1.0)
    chosen = family(pipes["flux"]).objective(ObjectiveOptions(density="flux_shift"))
    assert chosen.density == "flux_shift"
    assert chosen.options.tokens == 64 * 64


# -- what is taken and what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_missing_components_are_listed(name):
    pipe = tiny_pipeline(name)
    for part in family(pipe).needs:
        kept = getattr(pipe, part)
        setattr(pipe, part, None)
        with raises(BaseModelError, where="missing", given=(part,)):
            family(pipe)
        setattr(pipe, part, kept)


def test_a_base_folder_without_a_vae(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path)
    check_folder(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    with raises(BaseModelError, file=tmp_path, where="missing", given=("vae",)):
        check_folder(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae": [None, None], "unet": [None, None]}))
    with raises(BaseModelError, file=tmp_path, where="missing", given=("vae", "unet")):
        check_folder(tmp_path)
    (tmp_path / "unet").rename(tmp_path / "vae")
    with raises(BaseModelError, file=None, where="missing", given=("vae",)):
        family(DiffusionPipeline.from_pretrained(tmp_path, vae=None, unet=tiny_pipeline("sd").unet))


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_folders_that_are_no_pipeline(tmp_path, text):
    if text is not None:
        (tmp_path / "model_index.json").write_text(text)
    with raises(BaseModelError, file=tmp_path, where="model_index.json"):
        check_folder(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with raises(BaseModelError, file=tmp_path, where="family", given="DDPMPipeline"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_complete_folders_pass(pipes, name, tmp_path):
    pipes[name].save_pretrained(tmp_path)
    check_folder(tmp_path)


def test_inpainting_bases_are_refused():
    with raises(BaseModelError, where="unet", given=9, expected=4):
        family(tiny_pipeline("sd", in_channels=9))
    with raises(BaseModelError, where="transformer", given=48, expected=24):
        family(tiny_pipeline("flux", in_channels=48))


def test_other_pipelines_are_refused_by_name():
    pipe = diffusers.DDPMPipeline(tiny_pipeline("sd").unet, diffusers.DDPMScheduler())
    with raises(BaseModelError, where="family", given="DDPMPipeline") as caught:
        family(pipe)
    assert {"dit", "sd"} < set(caught.value.expected)


def test_every_file_is_one_family():
    assert list(families()) == [
        "auraflow", "bria", "chroma", "cogview4", "dit", "ernie_image", "flux", "flux2", "flux2_klein", "hidream", "hunyuan_dit",
        "hunyuan_image", "hunyuan_video", "ideogram4", "kandinsky5", "krea2", "longcat_image", "lumina2", "omnigen", "ovis_image",
        "pixart", "prx", "qwen_image", "sana", "sd", "sd3", "sdxl", "wan", "z_image",
    ]  # fmt: skip
    for kind in families().values():
        for name in kind.pipelines:
            assert hasattr(diffusers, name)


def test_a_new_file_is_a_new_family(tmp_path, monkeypatch):
    (tmp_path / "clay.py").write_text(
        "from veneer.training.families.noise_prediction.sd import StableDiffusion\n"
        "from veneer.training.families.family import Family\n"
        "class Clay(Family):\n"
        "    pipelines = ('ClayPipeline',)\n    needs = ('vae', 'unet')\n    denoiser = 'unet'\n"
        "    encode_text = StableDiffusion.encode_text\n    denoise = StableDiffusion.denoise\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    clay = type("ClayPipeline", (type(tiny_pipeline("sd")),), {})
    monkeypatch.setattr(diffusers, "ClayPipeline", clay, raising=False)
    assert "clay" in families()
    assert families()["clay"].matches(object.__new__(clay))


SIBLINGS = {
    "sd": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "flux": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}


@pytest.mark.parametrize(("name", "sibling"), [(n, s) for n, both in SIBLINGS.items() for s in both])
def test_siblings_train_and_generate_like_the_text_to_image_pipeline(pipes, name, sibling):
    pipe = pipes[name]
    other = getattr(diffusers, sibling).from_pipe(pipe, torch_dtype=None)
    ours, theirs = family(other), family(pipe)
    assert type(ours) is type(theirs)
    a, b = ours.encode_text(PROMPTS), theirs.encode_text(PROMPTS)
    assert all(torch.equal(a[k], b[k]) for k in b)
    kwargs = {"num_inference_steps": 1, "height": 16, "width": 24}
    images = [k.generate(["a dog"], [torch.Generator().manual_seed(0)], **kwargs)[0] for k in (ours, theirs)]
    assert images[0].size == (24, 16)
    assert images[0].tobytes() == images[1].tobytes()


def test_generating_leaves_modes_as_they_were(pipes):
    pipe = tiny_pipeline("dit")
    pipe.transformer.train()
    pipe.transformer.transformer_blocks[0].eval()
    images = family(pipe).generate(["duck"] * 2, [torch.Generator().manual_seed(0)] * 2, num_inference_steps=1)
    assert len(images) == 2
    assert pipe.transformer.training
    assert not pipe.transformer.transformer_blocks[0].training
    assert not pipe.vae.training


# -- the tiny pipelines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tiny_pipelines_are_saved_and_loaded(pipes, name, tmp_path):
    pipe = pipes[name]
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(pipe)
    for part in ("vae", family(pipe).denoiser, *family(pipe).text_towers):
        a, b = (getattr(p, part).state_dict() for p in (pipe, again))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    ours, theirs = family(pipe).encode_text(prompts_of(name)), family(again).encode_text(prompts_of(name))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key])


def test_tiny_pipelines_are_seeded_and_leave_the_global_state():
    state = torch.get_rng_state()
    a, b, c = tiny_pipeline("sd", 1), tiny_pipeline("sd", 1), tiny_pipeline("sd", 2)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [next(p.unet.parameters()) for p in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match="sd3"):
        tiny_pipeline("sd4")


def test_bad_truncate():
    with raises(OptionError, option="truncate", given="cut"):
        family(tiny_pipeline("sd"), truncate="cut")

"""Previews are reproducible and independent of the batch, restore the pipeline, and have settings in the file."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

import veneer
from tests.raising import raises
from veneer.injection.errors import OptionError, VeneerError
from veneer.testing.pipelines import FAMILIES, tiny_pipeline
from veneer.training.report.png_metadata import read_settings, save_png
from veneer.training.report.previews import PreviewSettings, generate_pairs, previews, replace_words

QUICK = PreviewSettings(seeds=(0, 1), steps=2, guidance=3.0)


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def pipe():
    return tiny_pipeline("sd")


def test_every_prompt_and_seed_has_its_own_image(pipe):
    made = previews(pipe, ["a dog", "a cat"], QUICK)
    assert [(p.prompt, p.seed) for p in made] == [("a dog", 0), ("a dog", 1), ("a cat", 0), ("a cat", 1)]
    assert len({pixels(p.image).tobytes() for p in made}) == 4


def test_an_image_does_not_depend_on_batch_company_or_the_global_generator(pipe):
    alone = previews(pipe, ["a cat"], PreviewSettings(seeds=(1,), steps=2, guidance=3.0))[0]
    torch.manual_seed(123)
    torch.rand(7)
    together = previews(pipe, ["a dog", "a cat"], PreviewSettings(seeds=(0, 1), steps=2, guidance=3.0, batch=3))[3]
    assert np.abs(pixels(alone.image) - pixels(together.image)).max() <= 1


def test_guidance_is_the_pipeline_s_by_default(pipe):
    default, same, other = (previews(pipe, ["a cat"], PreviewSettings(steps=2, guidance=g))[0] for g in (None, 7.5, 3.0))
    assert pixels(default.image).tobytes() == pixels(same.image).tobytes() != pixels(other.image).tobytes()


def test_stochastic_schedulers_are_seeded_by_image_too(pipe):
    from diffusers import DDPMScheduler

    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    one = previews(pipe, ["a dog", "a cat"], QUICK)
    two = previews(pipe, ["a dog", "a cat"], PreviewSettings(seeds=(0, 1), steps=2, guidance=3.0, batch=4))
    assert max(np.abs(pixels(a.image) - pixels(b.image)).max() for a, b in zip(one, two, strict=True)) <= 1


def test_a_prompt_listed_twice_gives_two_images(pipe):
    first, second = previews(pipe, ["a dog", "a dog"], PreviewSettings(steps=2))
    assert pixels(first.image).tobytes() != pixels(second.image).tobytes()


def test_the_pipeline_is_left_as_it_was(pipe):
    pipe.unet.train()
    pipe.unet.conv_in.eval()
    pipe.set_progress_bar_config(disable=False, desc="mine")
    scheduler, random = pipe.scheduler, torch.get_rng_state()
    before = {k: v for k, v in vars(scheduler).items() if not isinstance(v, torch.Tensor)}
    previews(pipe, ["a dog"], QUICK)
    assert pipe.scheduler is scheduler
    assert {k: v for k, v in vars(scheduler).items() if not isinstance(v, torch.Tensor)} == before
    assert pipe.unet.training
    assert not pipe.unet.conv_in.training
    assert pipe.unet.mid_block.training
    assert not pipe.vae.training
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}
    assert torch.equal(torch.get_rng_state(), random)


def test_the_pipeline_is_left_as_it_was_after_an_error_too(pipe):
    pipe.unet.train()
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="divisible"):
        previews(pipe, ["a dog"], PreviewSettings(size=(13, 13)))
    assert pipe.unet.training
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family(family):
    prompt = "goldfish" if family == "dit" else "a dog"
    size = (32, 32) if family == "flux" else None  # by itself it makes 512×512, 4,096 tokens
    settings = PreviewSettings(seeds=(0, 1), steps=2, batch=2, negative="red", size=size)
    made = previews(tiny_pipeline(family), [prompt], settings)
    assert pixels(made[0].image).std() > 0
    assert not np.array_equal(pixels(made[0].image), pixels(made[1].image))


def test_class_labels_by_name_and_number_and_the_unknown():
    pipe = tiny_pipeline("dit")
    assert previews(pipe, ["goldfish"], QUICK)[0].settings["prompt"] == "goldfish"
    assert len(previews(pipe, ["1"], QUICK)) == 2
    with raises(OptionError, option="prompt", given="unicorn") as caught:
        previews(pipe, ["unicorn"], QUICK)
    assert "goldfish" in caught.value.expected


def test_pairs_show_the_base_and_the_adapter(pipe):
    plain = previews(pipe, ["a dog"], QUICK)
    tuned = veneer.attach(pipe, "lora", rank=4)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if name.endswith("up"):
                p.fill_(0.5)
    found = generate_pairs(pipe, tuned, ["a dog"], QUICK)
    for pair, before in zip(found, plain, strict=True):
        assert np.array_equal(pixels(pair.base), pixels(before.image))
        assert not np.array_equal(pixels(pair.adapted), pixels(pair.base))


def test_base_words_change_the_prompt_but_not_the_noise(pipe):
    tuned = veneer.attach(pipe, "lora", rank=4)
    same = generate_pairs(pipe, [tuned], ["a red dog"], QUICK)
    other = generate_pairs(pipe, [tuned], ["a red dog"], QUICK, base_words={"red": "blue"})
    assert np.array_equal(pixels(same[0].adapted), pixels(other[0].adapted))
    assert not np.array_equal(pixels(same[0].base), pixels(other[0].base))
    noiseless = previews(pipe, ["a blue dog"], QUICK)
    assert not np.array_equal(pixels(other[0].base), pixels(noiseless[0].image))


def test_replaced_takes_longest_first_and_tidies_spaces():
    assert replace_words("a <toy> and <toy-2>", {"<toy": "X", "<toy-2>": "car", "<toy>": ""}) == "a and car"


def test_settings_travel_in_the_png(tmp_path, pipe):
    made = previews(pipe, ["a “dog” – 犬"], PreviewSettings(seeds=(7,), steps=2))[0]
    path = save_png(made.image, tmp_path / "deep" / "a.png", made.settings)
    found = read_settings(path)
    assert found == made.settings
    assert (found["seed"], found["steps"], found["scheduler"]) == (7, 2, "DDIMScheduler")
    assert np.array_equal(pixels(Image.open(path)), pixels(made.image))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    image = Image.new("RGB", (8, 8))
    path = save_png(image, tmp_path / "a.png", {"n": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_png(image, path, {"n": 2})
    monkeypatch.undo()
    assert read_settings(path) == {"n": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_files_without_settings_say_so(tmp_path, content):
    path = tmp_path / "a.png"
    if content is None:
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_bytes(content)
    with raises(VeneerError, file=path, where="settings"):
        read_settings(path)


def test_nothing_to_make_is_refused():
    with raises(OptionError, option="seeds", given=0):
        PreviewSettings(seeds=())


def test_a_scheduler_by_name_samples_with_the_config_of_the_pipelines():
    pipe = tiny_pipeline("sd")
    before = pipe.scheduler
    plain = previews(pipe, ["a cat"], PreviewSettings(steps=2))[0]
    other = previews(pipe, ["a cat"], PreviewSettings(steps=2, scheduler="ddpm"))[0]
    pipe.scheduler = DDPMScheduler.from_config(before.config)
    same = previews(pipe, ["a cat"], PreviewSettings(steps=2))[0]
    assert other.image.tobytes() == same.image.tobytes()
    assert other.image.tobytes() != plain.image.tobytes()


def test_the_scheduler_of_the_pipeline_is_restored():
    pipe = tiny_pipeline("sd")
    before = pipe.scheduler
    previews(pipe, ["a cat"], PreviewSettings(steps=1, scheduler="ddpm"))
    assert pipe.scheduler is before
